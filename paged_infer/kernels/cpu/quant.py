"""Linear layers with quantised weights on a CPU: packed once into the panels of ``quant.c``.

x is rounded inside the product, each row by itself (``digits.h``). W8A8 rounds it to int8, and with one scale per row
of W the result has the reference's bits. Weight-only products round it to fixed point relative to the row's largest
|x|: 16 bits for bfloat16, 24 for float32.

The 120 matrices of SmolLM2-135M's layers, one after another, on two threads of a busy machine with AMX, x in bfloat16;
in ms, the best of 15 runs (of 3 for 1,500 rows); "bfloat16" is ``linear_bfloat16.c``:

    rows    bfloat16    int8    int4, group size 128   32       W8A8
       1        10.1     5.9                    3.9      4.3     5.2
       8         9.7     6.1                    6.9      8.5     5.9
      32        10.5     8.6                    15       23      7.8
    1500       264     340                     620      996    233

With many rows, groups are slow, because the sum of each group is converted to a float. Without AMX, all were faster
than bfloat16 there even at 128 rows (268, 89, 113, 148 and 46 ms): ``vpdpbusd`` multiplies four pairs per lane,
``vdpbf16ps`` two. On an AMD EPYC, int4 in groups of 32 is slower than bfloat16 from 16 rows on (figures/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_infer.kernels.cpu.build import library, unavailable_reason
from paged_infer.kernels.cpu.large_pages import copy_in_large_pages
from paged_infer.kernels.cpu.linear import InC
from paged_infer.kernels.quant.product import Activations
from paged_infer.kernels.quant.weight import QuantisedWeight, unpack_int4

MOST_COLUMNS = 65_536  # their sums still fit into 32 bits
_WIDE, _STEP = 32, 64  # rows of a panel; columns that one group is padded to a multiple of


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedProduct:
    """The product in C. It is batch-invariant: the bits of a row do not depend on the other rows."""

    shape: tuple[int, int]  # N and K
    tensors: tuple[Tensor | None, ...]  # panels, scales, zero points / 8 or 128 or None, the padded bias (see quant.c)
    matrix: Tensor  # int64: the struct ``matrix`` of quant.c: their addresses, and sizes
    padded: int  # K, padded
    groups: int
    is_packed: bool
    order: Tensor | None  # [K] int64: the columns of x in the stored order of the codes; None: they are in that order
    activations: Literal["int8"] | None  # "int8": W8A8; None: weight-only, x keeps its dtype's precision

    @classmethod
    def of(
        cls, weight: QuantisedWeight, bias: Tensor | None, activations: Literal["int8"] | None = None
    ) -> QuantisedProduct:
        (height, depth), values = weight.shape, weight.values
        order = None if weight.columns is None else weight.columns.argsort()
        groups, is_packed = weight.scales.shape[1], weight.bits <= 4
        middle = 8 if is_packed else 128  # the offset that makes signed codes unsigned
        codes = unpack_int4(values) if weight.is_packed else values.view(torch.uint8) + middle
        if order is not None and groups == 1:  # without groups the order of the columns is free
            codes, order = codes[:, weight.columns], None
        codes = F.pad(codes, (0, -depth % _STEP if groups == 1 else 0, 0, -height % _WIDE))
        panels = codes.view(-1, _WIDE, codes.shape[1] // 4, 4).transpose(1, 2)
        if is_packed:
            panels = panels[:, :, :16] | panels[:, :, 16:] << 4
        zeros = None if weight.zeros is None else (weight.zeros - (8 if weight.is_packed else 0)) / middle
        if zeros is not None and not zeros.any():
            zeros = None
        start = torch.zeros(codes.shape[0])
        if bias is not None:
            start[:height] = bias
        padded = codes.shape[1]
        scales = _by_panel(weight.scales)
        zeros = None if zeros is None else _by_panel(zeros)
        tensors = copy_in_large_pages(panels), scales, zeros, start
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        matrix = torch.tensor([*addresses, depth, padded, height, groups, is_packed], dtype=torch.int64)
        return cls((height, depth), tensors, matrix, padded, groups, is_packed, order, activations)

    def __call__(self, x: Tensor) -> Tensor:
        height, depth = self.shape
        if x.shape[-1] != depth:
            raise RuntimeError(f"x {list(x.shape)} and W {[height, depth]}: shapes cannot be multiplied")
        if x.dim() != 2:
            return self(x.reshape(-1, depth)).view(*x.shape[:-1], height)
        if not x.is_cpu:
            raise RuntimeError(f"x is on {x.device}: the weights are on a CPU")
        if x.dtype not in (torch.float32, torch.bfloat16):
            return self(x.float()).to(x.dtype)
        if self.order is not None:
            x = x.index_select(1, self.order)
        elif x.stride(1) != 1:
            x = x.contiguous()
        num_rows, threads, digits = x.shape[0], torch.get_num_threads(), self._digits(x.dtype)
        room = self.matrix.new_empty(self._scratch(digits, num_rows, threads) // 8 + 1)
        out = x.new_empty(num_rows, height)
        library(x.dtype).quantised_linear(
            out.data_ptr(),
            x.data_ptr(),
            self.matrix.data_ptr(),
            room.data_ptr(),
            num_rows,
            x.stride(0),
            digits,
            threads,
        )
        return out

    def _digits(self, dtype: torch.dtype) -> int:
        return 1 if self.activations == "int8" else 3 if dtype is torch.float32 else 2

    def _scratch(self, digits: int, num_rows: int, threads: int) -> int:
        """Bytes of quant.c's four buffers, each a whole number of cache lines."""
        num_bytes = num_rows * (digits * (self.padded + 64 + 4 * self.groups) + 4) + 3 * 64
        return num_bytes + (threads * self.padded * _WIDE if self.is_packed else 0)

    def in_c(self, dtype: torch.dtype) -> InC | None:
        """This product for ``layers.c``, with x of ``dtype``; None: the columns of x have to be reordered first."""
        if self.order is not None:
            return None
        digits = self._digits(dtype)
        return InC("quantised_linear", self.matrix, None, self.shape, digits, partial(self._scratch, digits))


def pack_quantised(
    weight: QuantisedWeight, bias: Tensor | None, activations: Activations | None = None
) -> QuantisedProduct | None:
    """The product with W and b; None if C does not support it: another device, float8 (of W or x), a group size that
    is not a multiple of 32, more than ``MOST_COLUMNS`` columns, or no compiler."""
    (_, depth), groups = weight.shape, weight.scales.shape[1]
    suits = weight.values.is_cpu and weight.values.dtype in (torch.int8, torch.uint8) and 0 < depth <= MOST_COLUMNS
    if groups > 1:
        suits = suits and weight.group_size % 32 == 0
    if not suits or activations == "float8" or unavailable_reason() is not None:
        return None
    with torch.inference_mode(False), torch.no_grad():
        return QuantisedProduct.of(weight, None if bias is None else bias.detach(), activations)


def _by_panel(values: Tensor) -> Tensor:
    """Scales or zero points [N, G] -> [P, G, 32], P panels of 32 rows."""
    padded = F.pad(values.float(), (0, 0, 0, -values.shape[0] % _WIDE))
    return copy_in_large_pages(padded.view(-1, _WIDE, values.shape[1]).transpose(1, 2))
