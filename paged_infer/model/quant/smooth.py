"""SmoothQuant (Xiao 2022): part of an input's outliers moves into the weights, so that both fit 8 bits.

A token's inputs share one scale when they are rounded; a single channel that is 100 times the others leaves these
about one code. Weights have no such channel. Dividing the inputs by s and multiplying the columns of W by it balances
the two (equation 4):

    s[k] = max|x_k|^alpha / max|w_k|^(1 - alpha)
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.inference_mode()
def smooth_scales(weight: Tensor, largest: Tensor, alpha: float = 0.5) -> Tensor:
    """The scales [K] of the columns of W [N, K].

    Args:
        largest: of |x|, [K]; equal where scales must be.
        alpha: how much of the difficulty moves, 0 .. 1.

    Raises:
        ValueError: alpha is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: must be 0 to 1")
    columns = weight.detach().float().abs().amax(0)
    scales = largest.clamp(min=1e-5) ** alpha / columns.clamp(min=1e-5) ** (1 - alpha)
    return torch.where((largest > 0) & (columns > 0), scales, 1.0)
