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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_float32_is_packed(dtype) -> None:
    linear = Linear(400, 400).to(dtype)
    linear.prepack()
    assert linear._packed is None
