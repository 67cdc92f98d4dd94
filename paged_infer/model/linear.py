"""Linear: x W^T + b by a linear method, which decides how W is stored, loaded and multiplied (vLLM's LinearMethodBase).

A format of weights (AWQ, FP8) is one more method. Neither ``Linear`` nor the decoder nor the loader has a branch for
it. One of several ranks has smaller layers, whose methods load smaller pieces (``Piece.of_rank``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paged_infer.kernels.cpu.linear import Pack, PanelProduct, Product
from paged_infer.model.shard import Cut, Shard, runs


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the checkpoint, which fills some rows of one of our parameters.

    Attributes:
        name, shape: the tensor's in the checkpoint; of a rank's part, ``shape`` is the part's.
        row_dim: the dimension of the tensor that runs over our rows. GPT-2's Conv1D keeps [in, out], so 1.
        is_float: whether it must be stored as floats.
        order: our rows in the order that this lists; None: as they are stored.
        is_stack: the first dimension runs over experts, each of which fills as many of our rows.
        as_stored: a GGUF's blocks are not dequantised.
        shard: how ranks divide the tensor; None: each has all of it.
        cut: where the part that this piece is lies in the tensor; None: it is the whole.
        is_zero: another rank has the tensor, and this one zeros in its place.
    """

    name: str
    shape: tuple[int, ...]
    row_dim: int = 0
    is_float: bool = True
    order: tuple[int, ...] | None = None
    is_stack: bool = False
    as_stored: bool = False
    shard: Shard | None = None
    cut: Cut | None = None
    is_zero: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.shape if self.cut is None else self.cut.shape

    @property
    def column_dim(self) -> int:
        """The dimension of a matrix, or of a stack of them, that runs over our columns."""
        return len(self.shape) - 1 - self.row_dim + (1 if self.is_stack else 0)

    @property
    def num_rows(self) -> int:
        """Of our parameter that the tensor fills."""
        return self.shape[self.row_dim] * (self.shape[0] if self.is_stack else 1)

    def of_rank(self, rank: int, size: int) -> Piece:
        """The part that one of ``size`` ranks holds, which is read and loaded as if it were a tensor of its own."""
        if self.shard is None or size == 1:
            return self
        if self.shard.along == "rank 0":
            return replace(self, is_zero=rank > 0)
        order = self.order
        if self.shard.along == "columns":
            dim = self.column_dim
            share = self.shape[dim] // size
            ranges = [range(rank * share, (rank + 1) * share)]
        else:
            dim = self.row_dim
            ranges = self.shard.rows(self.shape[dim], rank, size)
            if order is not None:  # the rows are read as they are stored, and ordered when they are loaded
                chosen = [order[row] for rows in ranges for row in rows]
                ranges = runs(sorted(chosen))
                place = {row: i for i, row in enumerate(sorted(chosen))}
                order = tuple(place[row] for row in chosen)
        cut = Cut.along(self.shape, dim, ranges, size)
        return replace(self, shape=cut.part, order=order, cut=cut)

    def to_rows(self, tensor: Tensor) -> Tensor:
        """The tensor, in the checkpoint's shape, as rows of our parameter."""
        if self.is_stack:
            return tensor.movedim(self.row_dim, 1).flatten(0, 1)
        return tensor.t() if self.row_dim else tensor

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of ``to_rows``, a view."""
        if self.is_stack:
            return rows.unflatten(0, (self.shape[0], -1)).movedim(1, self.row_dim)
        return rows.t() if self.row_dim else rows


class LinearMethod(Protocol):
    """How one format of weights is allocated, loaded and multiplied. It has no state: that is in the ``Linear``."""

    def create(self, linear: Linear, dtype: torch.dtype) -> None:
        """Allocate the parameters that hold W [out, in], of a model that computes in ``dtype``."""

    def layout(self, pieces: tuple[Piece, ...]) -> dict[str, tuple[Piece, ...]]:
        """Our parameter -> the tensors of the checkpoint that fill it, in order.

        Args:
            pieces: the matrices stacked in W (those of q, k and v; gate and up), as a dense checkpoint stores them.
        """

    def load(self, linear: Linear, parameter: str, rows: slice, piece: Piece, tensor: Tensor) -> None:
        """Write the checkpoint's ``tensor``, described by ``piece``, to its rows of a parameter."""

    def prepack(self, linear: Linear) -> None:
        """All pieces are loaded: rearrange them for the device's kernels (vLLM: process_weights_after_loading)."""

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        """x [T, in] -> x W^T + b, [T, out]."""

    def dense(self, linear: Linear) -> Tensor:
        """W [out, in], in the dtype that the model computes in: ``moe.Experts`` multiplies by parts of it."""

    def parts(self, linear: Linear, count: int) -> list[Product] | None:
        """The products by ``count`` equal parts of the rows, once packed; None: ``dense`` costs nothing."""


MethodOf = Callable[[str], LinearMethod]
"""The name of one of the decoder's linear layers, such as ``layers.3.mlp.up`` -> its method."""


class DenseMethod:
    """One float matrix, ``weight``, and torch's product."""

    def create(self, linear: Linear, dtype: torch.dtype) -> None:
        linear.weight = nn.Parameter(torch.empty(linear.out_features, linear.in_features, dtype=dtype))

    def layout(self, pieces: tuple[Piece, ...]) -> dict[str, tuple[Piece, ...]]:
        return {"weight": pieces}

    def load(self, linear: nn.Module, parameter: str, rows: slice, piece: Piece, tensor: Tensor) -> None:
        linear.get_parameter(parameter).data[rows].copy_(piece.to_rows(tensor))

    def prepack(self, linear: Linear) -> None:
        pass

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        return F.linear(x, linear.weight, linear.bias)

    def dense(self, linear: Linear) -> Tensor:
        return linear.weight

    def parts(self, linear: Linear, count: int) -> list[Product] | None:
        return None


class PackedMethod(DenseMethod):
    """``DenseMethod`` with W laid out for the CPU's kernels (``kernels.cpu.linear``) by ``prepack``.

    In C's panels W is held once, as the parameter ``panels``, and ``weight`` is a copy made when it is read. If
    ``pack`` returns None (it would gain nothing), torch multiplies. Weights must not change after ``prepack``.
    """

    def __init__(self, pack: Pack) -> None:
        self.pack = pack

    def prepack(self, linear: Linear) -> None:
        if linear.is_stack or linear.stays_dense:
            return
        weight = linear.weight.clone() if linear.keeps_weight else linear.weight
        product = self.pack(weight, linear.bias)
        if isinstance(product, PanelProduct) and not linear.keeps_weight:
            del linear.weight
            linear.panels = nn.Parameter(product.panels, requires_grad=False)
        linear.product = product

    def apply(self, linear: Linear, x: Tensor) -> Tensor:
        product = linear.product
        return F.linear(x, linear.weight, linear.bias) if product is None else product(x)


DENSE = DenseMethod()


class Linear(nn.Module):
    """x [T, in] -> [T, out]. Its parameters are ``bias`` [out], or None, and whatever its method creates.

    They are allocated, not initialised.
    """

    weight: Tensor  # [out, in], of the dense methods
    bias: nn.Parameter | None
    method: LinearMethod
    product: Product | None = None  # of ``PackedMethod`` and of quantised methods, once packed
    dense_dtype: torch.dtype  # of quantised methods: what W is dequantised to
    keeps_weight = False  # for another that uses it
    stays_dense = False  # once packed: parts of W are multiplied by, such as those of ``mla``
    is_float32 = False  # whatever the model's dtype
    is_stack = False  # of the matrices of many experts, which are multiplied together by ``moe.Experts``

    def __init__(self, in_features: int, out_features: int, bias: bool = True, method: LinearMethod = DENSE) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.use(method, torch.get_default_dtype())

    def use(self, method: LinearMethod, dtype: torch.dtype) -> None:
        """Set the method. Its parameters, new and unset, replace those of the previous one."""
        bias = self.bias
        self._parameters.clear()
        self._buffers.clear()
        self.method, self.product = method, None
        method.create(self, torch.float32 if self.is_float32 else dtype)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x)

    def __getattr__(self, name: str) -> Any:  # of what is no attribute and no parameter
        product = self.__dict__.get("product")
        return product.weight if name == "weight" and isinstance(product, PanelProduct) else super().__getattr__(name)
