"""Fake quantisation, for QAT: the forward pass uses quantised weights, and the float weights behind them are trained.

    forward     Q = dequantise(quantise(W))
    backward    dL/dW = dL/dQ

The derivative of rounding is 0 wherever it exists, so no gradient would reach W. The straight-through estimator (STE)
treats rounding as the identity (Bengio, Leonard and Courville 2013, arXiv 1308.3432). It is biased: it updates W as if
Q changed with it, but Q changes only when W crosses the midpoint between two codes. Small updates in one direction add
up in W until it does.

With a fixed range, the estimator also passes no gradient to weights outside it. Here each forward pass computes the
grid from W's own smallest and largest values (``scheme.grid``), so no weight is more than half a step outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paged_infer.model.quant.scheme import Scheme, rounded


def fake_quantise(weight: Tensor, scheme: Scheme) -> Tensor:
    """W [N, K], quantised and dequantised in float32, with the bits of ``rounded``; the gradient passes to W unchanged.

    Raises:
        ValueError: as ``quantise``.
    """
    found: Tensor = _StraightThrough.apply(weight, scheme)
    return found


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scheme: Scheme) -> Tensor:
        return rounded(weight, scheme)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class FakeQuantise(nn.Module):
    """``fake_quantise`` as a parametrization: ``register_parametrization(linear, "weight", FakeQuantise(scheme))``.

    ``linear.weight`` is then on the grid, and the optimiser trains ``linear.parametrizations.weight.original``.
    """

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantise(weight, self.scheme)
