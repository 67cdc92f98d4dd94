"""Linear: x W^T + b, by whatever multiplies fastest with a W that does not change any more."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from paged_infer.kernels.cpu.linear import Pack, Product


class Linear(nn.Linear):
    """``nn.Linear`` that multiplies faster once ``prepack`` has been called; weights must not change after that."""

    _product: Product | None = None

    def prepack(self, pack: Pack) -> None:
        """Lay the weights out for the device's kernels; see ``kernels.linear``."""
        self._product = pack(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:  # [T, in] -> [T, out]
        return F.linear(x, self.weight, self.bias) if self._product is None else self._product(x)
