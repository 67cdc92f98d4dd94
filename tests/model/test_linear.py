"""A packed matrix multiplies as the plain one does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from paged_infer.model.linear import Linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "height", "packed"),
    [
        (1, 192, 1003, True),
        (7, 24, 80, False),
        (33, 640, 192, True),
        (300, 500, 203, True),
        (300, 5, 3, False),
    ],
)
def test_a_packed_linear_equals_the_plain_product(rows, width, height, packed, bias) -> None:
    torch.manual_seed(rows)
    linear = Linear(width, height, bias=bias)
    x = torch.randn(rows, width)
    plain = F.linear(x, linear.weight, linear.bias)
    linear.prepack()
    assert (linear._packed is not None) == (packed and torch.backends.mkldnn.is_available())
    with torch.inference_mode():
        torch.testing.assert_close(linear(x), plain, rtol=1e-5, atol=1e-5)
        strided = torch.randn(rows, 2 * width)[:, ::2]
        torch.testing.assert_close(
            linear(strided), F.linear(strided, linear.weight, linear.bias), rtol=1e-5, atol=1e-5
        )


def test_bfloat16_is_packed_where_the_processor_multiplies_it_and_stays_what_it_was() -> None:
    torch.manual_seed(0)
    linear = Linear(400, 400).to(torch.bfloat16)
    x = torch.randn(33, 400, dtype=torch.bfloat16)
    linear.prepack()
    can = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (linear._packed is not None) == can
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    with torch.inference_mode():
        torch.testing.assert_close(linear(x).double(), exact, rtol=2**-7, atol=2**-7)


def test_float16_is_not_packed() -> None:
    linear = Linear(400, 400).to(torch.float16)
    linear.prepack()
    assert linear._packed is None
