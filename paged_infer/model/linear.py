"""Linear: x W^T + b, with W laid out once for the CPU's matrix kernels.

torch's own float32 product rearranges W into tiles in every call. A decode step multiplies a few rows by every matrix
of the model, so the rearranging costs as much as the product. oneDNN, which torch ships, can keep the rearranged copy:
the products of a step of the 3M storyteller (18 rows, 2 cores) take about a third less time, at the price of a second
copy of the weights. torch's compiler uses the same two operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROWS_HINT = 32  # rows of a typical decode step; the layout serves any number
_WORTH_PACKING = (
    100_000  # elements; a smaller W is rearranged in less time than the call into oneDNN takes longer
)


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has matrix kernels for it here: bfloat16 wants a processor that has them, too."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class Linear(nn.Linear):
    """``nn.Linear`` that multiplies faster once ``prepack`` has been called; weights must not change after that."""

    _packed: Tensor | None = None

    def prepack(self) -> None:
        """Keep a rearranged copy of the weights, if oneDNN multiplies their dtype on this CPU."""
        suits = self.weight.device.type == "cpu" and self.weight.numel() >= _WORTH_PACKING
        if suits and _multiplies(self.weight.dtype):
            with torch.inference_mode(False), torch.no_grad():
                self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), _ROWS_HINT)

    def forward(self, x: Tensor) -> Tensor:  # [T, in] -> [T, out]
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self.bias, "none", [], "")
