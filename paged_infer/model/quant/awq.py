"""AWQ (Lin 2023): a weight matters as much as its input is large, so large inputs get finer steps.

Before rounding, column k of W is multiplied by s[k] and its input divided by it, which changes nothing but the error:
the scaled column has a larger share of its group's steps. s = mean|x|^alpha, with the alpha of 20 that loses least
(equation 5; 0 is round to nearest).
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_infer.model.quant.scheme import Scheme, rounded

ALPHAS = tuple(i / 20 for i in range(20))


@torch.inference_mode()
def awq_scales(weight: Tensor, mean: Tensor, products: Tensor, scheme: Scheme, name: str = "the weight") -> Tensor:
    """The scales [K] of the columns of W [N, K], around 1.

    Args:
        mean: of |x|, [K]; equal where scales must be.
        products: X^T X, [K, K], for the error |X (Q - W)^T|^2.
    """
    weight, mean = weight.detach().float(), mean.clamp(min=1e-4)
    best, least = torch.ones_like(mean), float("inf")
    for alpha in ALPHAS:
        scales = mean**alpha
        scales = scales / (scales.max() * scales.min()).sqrt()
        moved = rounded(weight * scales, scheme, name) / scales - weight
        error = ((moved @ products) * moved).sum().item()
        if error < least:
            best, least = scales, error
    return best
