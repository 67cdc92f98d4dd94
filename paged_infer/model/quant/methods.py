"""QuantisedMethod: a ``LinearMethod`` whose W stays quantised in memory.

    checkpoint --decode--> values, scales, zeros, g_idx of the Linear --prepack--> products, one for each run of rows

W is multiplied by the device's kernel or, where there is none, dequantised in every product. A float model never exists
as a whole. q, k and v (and gate and up) are rows of one matrix, multiplied as one, unless their ``g_idx`` differ
(GPTQ's act-order).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from math import prod

import torch
from torch import Tensor, nn

from paged_infer.kernels.cpu.linear import Product
from paged_infer.kernels.quant.product import PackQuantised, no_kernel, quantised_linear
from paged_infer.kernels.quant.weight import QuantisedWeight, dequantise, pack_int4, unpack_int4
from paged_infer.model.linear import DENSE, Linear, Piece
from paged_infer.model.quant.formats import Format
from paged_infer.model.quant.stored_piece import StoredPiece

logger = logging.getLogger(__name__)


class QuantisedMethod:
    """The method of one Linear, and of the matrices that are stacked in it.

    Args:
        form: the format of the checkpoint, or of the rounding while loading.
        pieces: the matrices, as a dense checkpoint stores them.
        pack: returns the device's kernel for a weight, or None.
    """

    def __init__(self, form: Format, pieces: tuple[Piece, ...], pack: PackQuantised = no_kernel) -> None:
        self.form, self.pieces, self.pack = form, pieces, pack
        self.tensors = [form.tensors(piece) for piece in pieces]

    def create(self, linear: Linear, dtype: torch.dtype) -> None:
        rows, columns, linear.dense_dtype = linear.out_features, linear.in_features, dtype
        held = self.form.held(rows, columns)
        if self.form.has_order:
            held["g_idx"] = (len(self.pieces), columns), torch.int32
        if "shape" in self.tensors[0]:
            held["shape"] = (len(self.pieces), 2), torch.int64
        for name, (shape, stored) in held.items():
            empty = torch.empty(shape, dtype=stored)
            if name in self.tensors[0]:
                setattr(linear, name, nn.Parameter(empty, requires_grad=False))
            else:  # the checkpoint has no separate tensor for it
                linear.register_buffer(name, empty)

    def layout(self, pieces: tuple[Piece, ...]) -> dict[str, tuple[Piece, ...]]:
        return {name: tuple(tensors[name] for tensors in self.tensors) for name in self.tensors[0]}

    def load(self, linear: Linear, parameter: str, rows: slice, piece: Piece, tensor: Tensor) -> None:
        if not isinstance(piece, StoredPiece):  # the bias
            return DENSE.load(linear, parameter, rows, piece, tensor)
        source = piece.source
        for name, part in self.form.decode(parameter, source, tensor).items():
            if name in ("scales", "zeros"):
                _check_scales(part, piece.name, name[:-1], strict=self.form.strict and name == "scales")
            if source.order is not None and name not in ("g_idx", "shape"):
                experts = source.shape[0] if source.is_stack else 1
                order = torch.tensor(source.order, device=part.device)
                part = part.unflatten(0, (experts, -1)).index_select(1, order).flatten(0, 1)
            getattr(linear, name).data[rows].copy_(part)

    def prepack(self, linear: Linear) -> None:
        if self.form.has_order:
            self._sort_columns(linear)
        if linear.is_stack:
            return
        if linear.stays_dense:  # its caller reads parts of W
            weight = self.dense(linear)
            linear.use(DENSE, weight.dtype)
            linear.weight.data = weight
            return
        linear.product, is_packed = self._product(linear, slice(0, linear.out_features), linear.bias)
        if is_packed:
            self._release(linear)

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        assert linear.product is not None, "prepack comes first"
        return linear.product(x)

    def dense(self, linear: Linear) -> Tensor:
        weights = self._weights(linear, slice(0, linear.out_features))
        return torch.cat([dequantise(weight) for weight in weights]).to(linear.dense_dtype)

    def parts(self, linear: Linear, count: int) -> list[Product]:
        size = linear.out_features // count
        rows = [slice(i * size, (i + 1) * size) for i in range(count)]
        found = [self._product(linear, some, None if linear.bias is None else linear.bias[some]) for some in rows]
        if all(is_packed for _, is_packed in found):
            self._release(linear)
        return [product for product, _ in found]

    def _product(self, linear: Linear, rows: slice, bias: Tensor | None) -> tuple[Product, bool]:
        """x -> x W^T + b for some rows of W; and whether only kernels compute it, which hold their own copy of W."""
        activations = self.form.activations
        if self.form.is_expanded:
            _warn_about_reference(self.form.describe(), activations, linear.values.device.type)
            return lambda x: quantised_linear(x, self._weights(linear, rows)[0], bias, activations), False
        products, are_packed, first = list[Product](), True, 0
        for weight in self._weights(linear, rows):
            last = first + weight.shape[0]
            its_bias = None if bias is None else bias[first:last]
            product, first = self.pack(weight, its_bias, activations), last
            if product is None:
                _warn_about_reference(self.form.describe(), activations, weight.values.device.type)
                product = partial(quantised_linear, weight=weight, bias=its_bias, activations=activations)
                are_packed = False
            products.append(product)
        if len(products) == 1:
            return products[0], are_packed
        return lambda x: torch.cat([product(x) for product in products], 1), are_packed

    def _release(self, linear: Linear) -> None:
        for name in {*self.form.held(1, linear.in_features), "g_idx", "shape"}:
            if hasattr(linear, name):
                delattr(linear, name)

    def _weights(self, linear: Linear, rows: slice) -> list[QuantisedWeight]:
        """Some rows of W as views of the sorted codes: one weight for each run of rows with the same column order."""
        columns = linear.in_features
        runs = [(rows, None)] if not self.form.has_order else self._runs(linear, rows)
        names = self.form.held(1, columns)
        return [
            self.form.weight(
                {name: getattr(linear, name)[run] for name in names}, (run.stop - run.start, columns), order
            )
            for run, order in runs
        ]

    def _runs(self, linear: Linear, rows: slice) -> list[tuple[slice, Tensor | None]]:
        """Runs of adjacent matrices with one order of columns, within ``rows``; an order of None: the model's own."""
        runs, start = list[tuple[slice, Tensor]](), 0
        for piece, order in zip(self.pieces, linear.g_idx.long(), strict=True):
            first, start = max(start, rows.start), start + piece.num_rows
            last = min(start, rows.stop)
            if first < last and runs and torch.equal(runs[-1][1], order):
                runs[-1] = slice(runs[-1][0].start, last), order
            elif first < last:
                runs.append((slice(first, last), order))
        plain = torch.arange(linear.in_features, device=linear.g_idx.device)
        return [(run, None if torch.equal(order, plain) else order) for run, order in runs]

    def _sort_columns(self, linear: Linear) -> None:
        """Make the columns of each group adjacent; ``g_idx`` then holds the new position of each column."""
        size, first = self.form.group(linear.in_features), 0
        for index, piece in enumerate(self.pieces):
            rows, g_idx = slice(first, first := first + piece.num_rows), linear.g_idx[index]
            groups = linear.in_features // size
            counts = torch.bincount(g_idx.clamp(0, groups), minlength=groups)  # clamped: a huge index allocates nothing
            if bool((g_idx < 0).any()) or counts.tolist() != [size] * groups:
                raise ValueError(f"{self.tensors[index]['g_idx'].name}: must name each group {size} times")
            order = g_idx.argsort(stable=True)
            values = linear.values.data[rows]
            if values.dtype == torch.uint8:
                values.copy_(pack_int4(unpack_int4(values)[:, order]))
            else:
                values.copy_(values[:, order])
            linear.g_idx.data[index] = order.argsort()


@dataclass(frozen=True, slots=True)
class FewBits:
    """The quantised linear layers of a decoder.

    Attributes:
        num_weights: their elements.
        num_bytes: the bytes of their codes, scales and zero points.
        kinds: for each kind of layer, how many there are and how they are quantised.
    """

    num_weights: int
    num_bytes: int
    kinds: tuple[str, ...]


def few_bits(linears: Iterable[tuple[str, Linear]]) -> FewBits | None:
    """What is quantised among ``decoder.linears()``; None: nothing."""
    num_weights, num_bytes, kinds = 0, 0, Counter[str]()
    for _, linear in linears:
        if isinstance(linear.method, QuantisedMethod):
            form, rows, columns = linear.method.form, linear.out_features, linear.in_features
            num_weights += rows * columns
            num_bytes += sum(prod(shape) * dtype.itemsize for shape, dtype in form.held(rows, columns).values())
            inputs = f", activations quantised to {form.activations}" if form.activations else ""
            kinds[f"{form.describe()}, {form.describe_group(columns)}{inputs}"] += 1
    if not kinds:
        return None
    return FewBits(num_weights, num_bytes, tuple(f"{count} of {kind}" for kind, count in kinds.items()))


def _check_scales(scales: Tensor, name: str, kind: str, *, strict: bool) -> None:
    """Raises ValueError unless scales, or zeros (which GGUF's minima become), are finite, and > 0 if ``strict``."""
    if scales.dtype != torch.float32:
        return
    wrong = ~scales.isfinite() | (scales <= 0 if strict else False)
    if bool(wrong.any()):
        row, value = int(wrong.nonzero()[0, 0]), scales[wrong][0].item()
        limit = "finite and > 0" if strict else "finite"
        raise ValueError(f"{name}: {kind} {value} of row {row}: must be {limit}")


@cache
def _warn_about_reference(kind: str, activations: str | None, device: str) -> None:
    logger.warning(
        "no kernel for weights of %s%s on this %s: weights are dequantised in every product, which is slow",
        kind,
        f" and activations of {activations}" if activations else "",
        device,
    )
