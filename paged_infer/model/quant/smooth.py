"""SmoothQuant (Xiao 2022): move part of the activations' outliers into the weights, so that both can be int8.

The activations of a token share one scale, so a channel with 100 times the magnitude of the others leaves them three
codes: -1, 0 and 1. Weights have no such outliers. Dividing the inputs by s and multiplying the columns of W by s
balances the two (equation 4):

    s[k] = max|x_k|^alpha / max|w_k|^(1 - alpha)
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.inference_mode()
def smooth_scales(weight: Tensor, largest: Tensor, alpha: float = 0.5) -> Tensor:
    """The scales s [K] of the columns of W [N, K]; 1 for a channel whose inputs or weights are all zero.

    Args:
        largest: max |x| of each input channel, [K]; equal where the scales must be equal (``folding.shared``).
        alpha: migration strength, 0 .. 1: how much of the difficulty moves from the activations to the weights.

    Raises:
        ValueError: alpha is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: must be 0 to 1")
    columns = weight.detach().float().abs().amax(0)
    scales = largest.clamp(min=1e-5) ** alpha / columns.clamp(min=1e-5) ** (1 - alpha)
    return torch.where((largest > 0) & (columns > 0), scales, 1.0)
