"""Linear layers on a CPU: x W^T + b, with W packed once into the layout that the product needs.

torch's own product packs W into tiles in every call. A decode step multiplies a few rows by every matrix of the model,
so packing costs as much as the product. Two ways keep the packed copy, at the cost of its memory:

- ``pack_c``: float32 panels for ``linear.c``, which describes their layout;
- ``pack_onednn``: the layout that oneDNN prefers. torch ships oneDNN, and its compiler uses the same two operations.

All matrices of the 3M storyteller, one after another, 18 rows, two threads: torch 2.2 ms, oneDNN 1.5, C 0.7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_infer.kernels.cpu.build import library, unavailable_reason

Product = Callable[[Tensor], Tensor]  # x [T, in] -> [T, out]
# (weight [out, in], bias [out] or None) -> the product; None where packing does not help or is not possible
Pack = Callable[[Tensor, Tensor | None], Product | None]

ROWS_HINT = 32  # rows of a typical decode step; oneDNN's layout works for any number
WORTH_PACKING = 100_000  # elements; for a smaller W the call costs more than the packing that it saves


@dataclass(frozen=True, slots=True, eq=False)
class PanelProduct:
    """The product by ``linear.c``. It is batch-invariant: the bits of a row do not depend on the other rows."""

    weight: Tensor  # [N, K], for inputs that C does not support
    bias: Tensor | None
    panels: Tensor  # [ceil(N / WIDE), K, WIDE]
    start: Tensor  # [ceil(N / WIDE) * WIDE] the bias, or zeros

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> PanelProduct:
        height, depth = weight.shape
        wide = library().panel_width()
        num_panels = -(-height // wide)
        rows = weight.new_zeros(num_panels * wide, depth)
        rows[:height] = weight
        start = weight.new_zeros(num_panels * wide)
        if bias is not None:
            start[:height] = bias
        panels = rows.view(num_panels, wide, depth).transpose(1, 2).contiguous()
        return cls(weight, bias, panels, start)

    def __call__(self, x: Tensor) -> Tensor:
        height, depth = self.weight.shape
        suits = x.dtype is torch.float32 and x.is_cpu and x.dim() == 2 and x.stride(1) == 1
        if not suits or x.shape[1] != depth or not depth:
            return F.linear(x, self.weight, self.bias)
        num_rows = x.shape[0]
        if depth % 1024 == 0 and num_rows > 4:  # rows of this length would compete for the same cache sets
            x = x.new_empty(num_rows, depth + 16)[:, :depth].copy_(x)
        out = x.new_empty(num_rows, height)  # not torch.empty, which follows the process's default dtype and device
        library().linear(
            out.data_ptr(), x.data_ptr(), self.panels.data_ptr(), self.start.data_ptr(),
            num_rows, depth, height, x.stride(0), torch.get_num_threads(),
        )  # fmt: skip
        return out


def pack_c(weight: Tensor, bias: Tensor | None) -> Product | None:
    """float32 by ``linear.c``; bfloat16 by oneDNN, which is twice as fast on a processor with bfloat16 products."""
    with torch.inference_mode(False), torch.no_grad():
        if weight.is_cpu and weight.dtype is torch.float32 and unavailable_reason() is None:
            return PanelProduct.of(weight.detach(), None if bias is None else bias.detach())
    return pack_onednn(weight, bias)


def pack_onednn(weight: Tensor, bias: Tensor | None) -> Product | None:
    """By oneDNN, if it has matrix kernels for this dtype on this CPU and the matrix is large enough."""
    if not weight.is_cpu or weight.numel() < WORTH_PACKING or not _onednn_multiplies(weight.dtype):
        return None
    with torch.inference_mode(False), torch.no_grad():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_HINT)
    return lambda x: torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """bfloat16 also needs support by the processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
