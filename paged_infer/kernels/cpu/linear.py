"""Linear layers on a CPU: x W^T + b, with W packed once into the layout that the product needs.

torch's own product packs W into tiles in every call. A decode step multiplies a few rows by every matrix of the model,
so packing costs as much as the product. There are two other ways:

- ``pack_c``: panels for ``linear.c`` (float32) and ``linear_bfloat16.c``, which describe their layouts, in place of W;
- ``pack_onednn``: a copy in oneDNN's layout. torch ships oneDNN, and its compiler uses the same two operations.

All matrices of SmolLM2-135M, one after another, in bfloat16 with AMX, on two threads of a busy machine: for 1, 8 and 32
rows, C took 14, 15 and 19 ms and oneDNN 27, 32 and 39 ms, at a memory bandwidth of 20 to 25 GB/s. For 1,500 rows, C
took 0.9 to 1.2 times as long as oneDNN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_infer.kernels.cpu.build import DTYPES, library, unavailable_reason

Product = Callable[[Tensor], Tensor]  # x [T, in] -> [T, out]
# (weight [out, in], bias [out] or None) -> the product; None where packing does not help or is not possible
Pack = Callable[[Tensor, Tensor | None], Product | None]
PackHeads = Callable[[Tensor], Product]  # weight [H, out, in] -> the product, x [T, H, in] -> [T, H, out]

ROWS_HINT = 32  # rows of a typical decode step; oneDNN's layout works for any number
WORTH_PACKING = 100_000  # elements; for a smaller W the call costs more than the packing that it saves
_WIDE, _DEEP = 32, 32  # of linear_bfloat16.c
_TOGETHER = 64  # panels that are rearranged at a time


class InC(NamedTuple):
    """A product that ``layers.c`` calls; its rows have exactly K elements, without padding."""

    function: str  # its name in the library
    weights: Tensor  # passed to the function as W
    start: Tensor | None  # float32, the bias or zeros
    shape: tuple[int, int]  # N and K
    digits: int = 0  # digits per element of x, in ``quantised_linear``
    scratch: Callable[[int, int], int] = lambda rows, threads: 0  # bytes of temporary memory that it needs


@dataclass(frozen=True, slots=True, eq=False)
class PanelProduct:
    """The product in C. It is batch-invariant: the bits of a row do not depend on the other rows."""

    shape: tuple[int, int]  # N and K
    bias: Tensor | None
    panels: Tensor  # float32 [P, K, WIDE], for P WIDE rows of W; bfloat16 [P, K / 2, WIDE, 2]: pairs of columns
    start: Tensor  # [P WIDE] float32: the bias, or zeros

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, reuse: bool = False) -> PanelProduct:
        """Args:
        reuse: write the panels to the memory of ``weight``, whose values are then lost, unless they need padding.
        """
        height, depth = weight.shape
        wide, deep = panel_shape(weight.dtype)
        num_panels, pair = -(-height // wide), 1 if deep == 1 else 2
        if height % wide or depth % deep:
            padded = F.pad(weight, (0, -depth % deep, 0, -height % wide))
        else:
            padded = weight.contiguous() if reuse else weight.clone(memory_format=torch.contiguous_format)
        start = padded.new_zeros(num_panels * wide, dtype=torch.float32)
        if bias is not None:
            start[:height] = bias
        rows, panels = padded.view(num_panels, wide, -1, pair), padded.view(num_panels, -1, wide, pair)
        for first in range(0, num_panels, _TOGETHER):  # a panel overwrites its own rows
            some = slice(first, first + _TOGETHER)
            panels[some] = rows[some].transpose(1, 2).clone(memory_format=torch.contiguous_format)
        return cls((height, depth), bias, panels.squeeze(-1) if pair == 1 else panels, start)

    @property
    def weight(self) -> Tensor:
        """W [N, K], a copy."""
        rows = self.panels.transpose(1, 2).reshape(len(self.start), -1)
        return rows[: self.shape[0], : self.shape[1]]

    def rows(self, numbers: Tensor) -> Tensor:
        """The rows of W with indices ``numbers`` [T], int64, within 0 .. N - 1: [T, K], a copy."""
        wide = self.panels.shape[2]
        return self.panels[numbers // wide, :, numbers % wide].flatten(1)[:, : self.shape[1]].contiguous()

    def in_c(self, dtype: torch.dtype) -> InC | None:
        """For x of ``dtype``; None: x has to be padded."""
        if self.shape[1] % panel_shape(self.panels.dtype)[1]:
            return None
        function = "linear" if self.panels.dtype is torch.float32 else "linear_bfloat16"
        return InC(function, self.panels, self.start, self.shape)

    def __call__(self, x: Tensor) -> Tensor:
        height, depth = self.shape
        suits = x.dtype is self.panels.dtype and x.is_cpu and x.dim() == 2 and x.stride(1) == 1
        if not suits or x.shape[1] != depth or not depth:
            return F.linear(x, self.weight, self.bias)
        num_rows, is_float32 = x.shape[0], x.dtype is torch.float32
        wide_x = depth if is_float32 else depth + -depth % _DEEP
        if wide_x != depth or (depth % 1024 == 0 and num_rows > 4):
            # Rows of this length would compete for the same cache sets, or are not a multiple of a step.
            x = F.pad(x, (0, wide_x - depth + 32))[:, :wide_x]
        out = x.new_empty(num_rows, height)  # not torch.empty, which follows the process's default dtype and device
        built = library(x.dtype)
        (built.linear if is_float32 else built.linear_bfloat16)(
            out.data_ptr(), x.data_ptr(), self.panels.data_ptr(), self.start.data_ptr(),
            num_rows, wide_x, height, x.stride(0), torch.get_num_threads(),
        )  # fmt: skip
        return out


def panel_shape(dtype: torch.dtype) -> tuple[int, int]:
    """The rows of W in a panel, and the step that its columns are padded to a multiple of."""
    return (library().panel_width(), 1) if dtype is torch.float32 else (_WIDE, _DEEP)


def pack_c(weight: Tensor, bias: Tensor | None) -> Product | None:
    """A product in C, whose panels overwrite ``weight``; by oneDNN for other dtypes, or where C is not available."""
    with torch.inference_mode(False), torch.no_grad():
        if weight.is_cpu and weight.dtype in DTYPES and unavailable_reason(weight.dtype) is None:
            return PanelProduct.of(weight.detach(), None if bias is None else bias.detach(), reuse=True)
    return pack_onednn(weight, bias)


def heads_product(weight: Tensor) -> Product:
    """A ``PackHeads`` in torch: multiply each head's part of x by the head's own matrix."""
    return lambda x: torch.bmm(x.transpose(0, 1), weight.mT).transpose(0, 1)


def pack_heads_c(weight: Tensor) -> Product:
    """The same in C, from a copy of W in panels; here the bits of a row do not depend on the other rows."""
    if not weight.is_cpu or weight.dtype not in DTYPES or unavailable_reason(weight.dtype) is not None:
        return heads_product(weight)
    with torch.inference_mode(False), torch.no_grad():
        heads = [PanelProduct.of(matrix, None) for matrix in weight.detach()]
    return lambda x: torch.stack([head(part) for head, part in zip(heads, x.unbind(1), strict=True)], 1)


def pack_onednn(weight: Tensor, bias: Tensor | None) -> Product | None:
    """The product by oneDNN; None if it has no kernel for this dtype on this CPU, or the matrix is too small."""
    if not weight.is_cpu or weight.numel() < WORTH_PACKING or not _onednn_multiplies(weight.dtype):
        return None
    with torch.inference_mode(False), torch.no_grad():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_HINT)
    return lambda x: torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has matrix kernels for ``dtype``; for bfloat16 the processor must support it, too."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
