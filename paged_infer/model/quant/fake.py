"""Fake quantisation: a layer computes with rounded weights while the float weights that it rounds are trained.

    forward     Q = dequantise(quantise(W))
    backward    dL/dW = dL/dQ

Rounding is a staircase: its true derivative is 0 wherever it exists, so no gradient would reach W. The straight-through
estimator takes it for the identity (Bengio, Leonard and Courville 2013, arXiv 1308.3432). That is biased: it moves W as
if Q moved along, and Q moves only where W crosses the middle between two codes. But small steps in one direction add up
in W until it does.

Estimators for a fixed range also pass no gradient to weights outside of it. Here each forward pass makes the grid of
W's own smallest and largest values (``scheme.grid``), so none lies further outside than half a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paged_infer.model.quant.scheme import Scheme, rounded


def fake_quantise(weight: Tensor, scheme: Scheme) -> Tensor:
    """W [N, K] quantised and dequantised, to the bit, in float32; its gradient goes to W unchanged.

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

    ``linear.weight`` is then on the grid, and what is trained is ``linear.parametrizations.weight.original``.
    """

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantise(weight, self.scheme)
