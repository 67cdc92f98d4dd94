"""Fake quantisation computes with quantised weights and trains the float weights behind them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from paged_infer.kernels.quant.weight import dequantise
from paged_infer.model.quant.fake import FakeQuantise, fake_quantise
from paged_infer.model.quant.scheme import Scheme, quantise

SCHEMES = [Scheme(2, False, "group", 8), Scheme(3, True, "group", 4), Scheme(4), Scheme(8, False, "tensor")]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.bits}-{scheme.strategy}")
def test_it_is_quantise_and_dequantise_to_the_bit(scheme: Scheme) -> None:
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    found = fake_quantise(weight.requires_grad_(), scheme)
    assert torch.equal(found, dequantise(quantise(weight, scheme))) and not torch.equal(found, weight)


def test_a_row_of_int2_by_hand() -> None:
    """Weights from -3 to 3 and four codes: the step is 2, the zero point -2 + round(1.5) = 0, the grid -4, -2, 0, 2."""
    weight = torch.tensor([[-3.0, -0.9, 0.8, 1.2, 3.0]])
    assert fake_quantise(weight, Scheme(2, False)).tolist() == [[-4.0, 0.0, 0.0, 2.0, 2.0]]


def test_gradients_go_straight_through_as_by_hand() -> None:
    """loss = sum (x Q^T - y)^2: dL/dQ = 2 (x Q^T - y)^T x, and dL/dW is the same."""
    generator = torch.Generator().manual_seed(1)
    weight, x, y = (torch.randn(*size, generator=generator) for size in ((4, 8), (5, 8), (5, 4)))
    weight.requires_grad_()
    rounded = fake_quantise(weight, Scheme(2))
    ((x @ rounded.t() - y) ** 2).sum().backward()
    torch.testing.assert_close(weight.grad, 2 * (x @ rounded.detach().t() - y).t() @ x)


def test_small_steps_add_up_in_the_float_weights_until_a_code_changes() -> None:
    linear = nn.Linear(4, 1, bias=False)
    linear.weight.data = torch.tensor([[-1.0, -0.4, 0.4, 1.0]])
    register_parametrization(linear, "weight", FakeQuantise(Scheme(2)))
    tool, seen = torch.optim.SGD(linear.parameters(), lr=0.01), []
    for _ in range(40):
        linear(torch.tensor([[0.0, 1.0, 0.0, 0.0]])).neg().sum().backward()
        tool.step()
        tool.zero_grad()
        seen.append(linear.weight[0, 1].item())
    assert seen[0] == pytest.approx(-2 / 3) and seen[-1] == 0.0 and len(set(seen)) == 2 and seen == sorted(seen)


def test_what_cannot_be_rounded_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="group_size=5: does not divide the 8 columns"):
        fake_quantise(torch.zeros(1, 8), Scheme(2, True, "group", 5))
    with pytest.raises(ValueError, match="infinite or NaN"):
        fake_quantise(torch.full((1, 8), torch.nan), Scheme(2))
