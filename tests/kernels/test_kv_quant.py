"""8-bit codes and a scale for each vector: bounds of the error, limits of float16, no influence of other vectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from paged_infer.config import KV_CACHE_DTYPES
from paged_infer.kernels.kv_quant import KV_DTYPES, LARGEST_CODE, LARGEST_SCALE, dequantise_kv, quantise_kv

TYPES = pytest.mark.parametrize("dtype", LARGEST_CODE)


def bound(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The bound of each element's error, as the module's docstring states it."""
    scale = scale.float()[..., None] * (1 + 1e-6)
    if dtype is torch.int8:
        return (scale / 2).expand(x.shape)
    relative, absolute = (2**-4, 2**-10) if dtype is torch.float8_e4m3fn else (2**-3, 2**-17)
    return torch.maximum(x.abs() * relative * (1 + 1e-6), scale * absolute)


def test_the_options_of_the_engine_are_the_types_that_there_are() -> None:
    assert ("auto", *KV_DTYPES) == KV_CACHE_DTYPES
    assert [*KV_DTYPES.values()] == [*LARGEST_CODE]


@TYPES
@pytest.mark.parametrize("size", [1e-7, 1e-4, 1.0, 50.0, 1e6])
def test_the_error_of_each_element_is_within_its_bound(dtype: torch.dtype, size: float) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, 64, generator=rng) * size * torch.rand(50, 3, 1, generator=rng)
    x[..., ::5] *= 1e-3  # below the smallest normal code of float8
    codes, scale = quantise_kv(x, dtype)
    assert codes.dtype == dtype and scale.dtype == torch.float16 and scale.shape == x.shape[:-1]
    assert ((dequantise_kv(codes, scale) - x).abs() <= bound(x, scale, dtype)).all()
    exact = x.abs().amax(-1) / LARGEST_CODE[dtype]
    normal = exact >= 2**-14
    assert (scale.float() >= exact).all()
    assert (scale.float() <= exact * (1 + 2**-10) + 2**-24).all() and (size < 1 or normal.any())


@TYPES
def test_a_vector_of_zeros_has_scale_zero_and_stays_zero(dtype: torch.dtype) -> None:
    codes, scale = quantise_kv(torch.zeros(2, 8), dtype)
    assert not scale.any() and not dequantise_kv(codes, scale).any()


@TYPES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_make_their_own_vector_nan_and_no_other(dtype: torch.dtype, bad: float) -> None:
    x = torch.randn(3, 8)
    codes, scale = quantise_kv(x, dtype)
    x[1, 4] = bad
    spoilt = dequantise_kv(*quantise_kv(x, dtype))
    assert spoilt[1].isnan().all()
    assert torch.equal(spoilt[[0, 2]], dequantise_kv(codes, scale)[[0, 2]])


@TYPES
def test_what_exceeds_the_largest_scale_saturates(dtype: torch.dtype) -> None:
    x = torch.tensor([[3e38, -3e38, 0.0, 1e30]])
    codes, scale = quantise_kv(x, dtype)
    limit = LARGEST_SCALE * LARGEST_CODE[dtype]
    assert dequantise_kv(codes, scale).tolist() == [[limit, -limit, 0.0, limit]]


@TYPES
def test_a_vector_has_the_same_bits_in_any_company_and_in_any_precision_that_holds_it(dtype: torch.dtype) -> None:
    x = torch.randn(9, 2, 24).bfloat16()
    codes, scale = quantise_kv(x, dtype)
    for row in range(9):
        alone, own = quantise_kv(x[row : row + 1].float(), dtype)
        assert torch.equal(alone.view(torch.uint8)[0], codes.view(torch.uint8)[row]) and torch.equal(own[0], scale[row])


def test_the_product_of_code_and_scale_is_exact_in_float32() -> None:
    for dtype in LARGEST_CODE:
        codes = torch.arange(256, dtype=torch.uint8).view(dtype)
        codes = codes[codes.double().isfinite()]
        scale = torch.tensor([2**-24, 1.0009765625, 65504.0]).half()
        wide = dequantise_kv(codes.expand(3, -1), scale)
        assert torch.equal(wide.double(), codes.double() * scale.double()[:, None])
