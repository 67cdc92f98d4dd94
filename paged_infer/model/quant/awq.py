"""AWQ (activation-aware weight quantisation, Lin 2023): columns whose inputs are large get finer steps.

An error in a weight is multiplied by its input. So before rounding, column k of W is multiplied by s[k] and its input
divided by s[k]: the product stays the same, and relative to the column the steps of its group become smaller. s =
mean|x|^alpha, where a grid search over 20 values of alpha takes the one with the smallest output error (section 3.2,
equation 5; alpha = 0 is rounding to nearest).
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_infer.model.quant.scheme import Scheme, rounded

ALPHAS = tuple(i / 20 for i in range(20))


@torch.inference_mode()
def awq_scales(weight: Tensor, mean: Tensor, products: Tensor, scheme: Scheme, name: str = "the weight") -> Tensor:
    """The scales [K] of the columns of W [N, K]; the geometric mean of the largest and the smallest is 1.

    Args:
        mean: mean |x| of each input channel, [K]; equal where the scales must be equal (``folding.shared``).
        products: X^T X, [K, K], to compute the error |X (Q - W)^T|^2.
        name: of W, for error messages.

    Raises:
        ValueError: as ``quantise``.
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
