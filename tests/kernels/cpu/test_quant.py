"""Quantised products in C equal the reference, and a row has the same bits in any batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_processors import processor  # noqa: F401  (a fixture)

from paged_infer.kernels.cpu.build import unavailable_reason
from paged_infer.kernels.cpu.quant import QuantisedProduct, pack_quantised
from paged_infer.kernels.quant.product import quantised_linear
from paged_infer.kernels.quant.weight import QuantisedWeight, dequantise
from paged_infer.model.quant.scheme import Scheme, quantise

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=f"no C kernels: {unavailable_reason()}")

SCHEMES = {
    "int8": Scheme(8),
    "int8 per tensor": Scheme(8, strategy="tensor"),
    "int8 g32 with zeros": Scheme(8, False, "group", 32),
    "int8 g96": Scheme(8, True, "group", 96),
    "int4": Scheme(4),
    "int4 g32": Scheme(4, True, "group", 32),
    "int4 g32 with zeros": Scheme(4, False, "group", 32),
    "int4 g64": Scheme(4, True, "group", 64),
    "int3 g64": Scheme(3, True, "group", 64),
}
# Rounding of the result, and of x in fixed point, relative to the sum of |x| |w|. W8A8 with a scale per row is exact.
TOLERANCE = {torch.float32: (2e-7, 2e-7), torch.bfloat16: (2**-8, 2**-15)}


def a_weight(scheme: Scheme, height: int = 203, width: int = 192, seed: int = 0) -> QuantisedWeight:
    rng = torch.Generator().manual_seed(seed)
    return quantise(torch.randn(height, width, generator=rng) / math.sqrt(width), scheme)


def a_product(weight: QuantisedWeight, bias: torch.Tensor | None = None, activations=None) -> QuantisedProduct:
    product = pack_quantised(weight, bias, activations)
    assert product is not None
    return product


def assert_right(product: QuantisedProduct, x: torch.Tensor, weight: QuantisedWeight, bias=None) -> torch.Tensor:
    """Weight-only: near an exact sum with unrounded x. W8A8 with a scale per row: the reference's bits."""
    out, activations = product(x), product.activations
    if activations == "int8" and product.groups == 1 and weight.zeros is None:
        assert torch.equal(out, quantised_linear(x, weight, bias, activations))
        return out
    exact = quantised_linear(x.double(), weight, None if bias is None else bias.double(), activations)
    size = (x.double().abs() @ dequantise(weight).double().abs().T).amax().item() + 1
    rtol, part = TOLERANCE[x.dtype]
    torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=part * size)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@given(
    rows=st.sampled_from([1, 2, 3, 5, 8, 16, 17, 33, 70]),
    width=st.sampled_from([192, 960, 1536]),
    height=st.sampled_from([1, 31, 32, 64, 203]),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=5, deadline=None)
def test_products_equal_the_reference(scheme, activations, dtype, rows, width, height, has_bias, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = a_weight(scheme, height, width, seed)
    bias = torch.randn(height, generator=rng) if has_bias else None
    x = torch.randn(rows, 2 * width, generator=rng).to(dtype)[:, width:]  # rows are apart
    out = assert_right(a_product(weight, bias, activations), x, weight, bias)
    assert out.dtype is dtype and out.shape == (rows, height)


@given(
    bits=st.sampled_from([2, 4, 8]),
    is_symmetric=st.booleans(),
    activations=st.sampled_from([None, "int8"]),
    dtype=st.sampled_from([*TOLERANCE]),
    rows=st.integers(1, 70),
    width=st.integers(1, 257),
    height=st.integers(1, 70),
)
@settings(max_examples=40, deadline=None)
def test_rows_and_matrices_may_have_any_size(bits, is_symmetric, activations, dtype, rows, width, height) -> None:
    weight = a_weight(Scheme(bits, is_symmetric), height, width)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
    assert_right(a_product(weight, None, activations), x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_row_has_the_same_bits_in_a_batch_of_1_to_70_rows_and_on_two_threads(scheme, activations, dtype) -> None:
    x = torch.randn(70, 192).to(dtype)
    product = a_product(a_weight(scheme), torch.randn(203), activations)
    together = product(x)
    for rows in range(1, 71):
        assert torch.equal(product(x[:rows]), together[:rows])
    for row in range(70):
        assert torch.equal(product(x[row : row + 1])[0], together[row])
    usual = torch.get_num_threads()
    torch.set_num_threads(3 - min(usual, 2))
    try:
        assert torch.equal(product(x), together)
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompts_rows_have_the_bits_that_they_have_alone(dtype) -> None:
    """Its result is too large for the cache, and its rows are multiplied by each panel in parts."""
    x = torch.randn(2049, 64).to(dtype)
    for activations in (None, "int8"):
        product = a_product(a_weight(Scheme(8), 1024, 64), None, activations)
        together = product(x)
        for row in (0, 17, 255, 256, 2032, 2048):
            assert torch.equal(product(x[row : row + 1])[0], together[row])


def test_the_integers_of_w8a8_are_exact_on_each_processor(processor) -> None:  # noqa: F811
    """With scales of 1 the product is an exact sum of integers."""
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (77, 640), generator=rng).to(torch.int8)
    weight = QuantisedWeight(codes, torch.ones(77, 1), None, 8, 640, (77, 640))
    x = torch.randint(-127, 128, (9, 640), generator=rng).float()
    x[:, 0] = -127.5  # so that a step is 1; -128 after rounding to even
    exact = x.round().double() @ codes.double().T
    for rows in (1, 9):
        assert torch.equal(a_product(weight, None, "int8")(x[:rows]).double(), exact[:rows])


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, False, "group", 32)])
def test_columns_are_multiplied_in_the_order_of_the_model(scheme) -> None:
    """GPTQ's act-order stores them in another order."""
    stored = a_weight(scheme)
    order = torch.randperm(192)
    weight = QuantisedWeight(
        stored.values, stored.scales, stored.zeros, stored.bits, stored.group_size, stored.shape, order
    )
    assert_right(a_product(weight), torch.randn(5, 192), weight)


def test_zero_points_need_not_be_integers() -> None:
    """As in GGUF's Q4_1, where code 0 stands for any value, the minimum."""
    whole = a_weight(Scheme(4, False, "group", 32))
    weight = QuantisedWeight(whole.values, whole.scales, whole.zeros + 0.3, 4, 32, whole.shape)
    assert_right(a_product(weight), torch.randn(5, 192), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", [None, "int8"])
def test_nan_and_infinity_stay_in_their_rows_and_zeros_give_the_bias(activations, dtype) -> None:
    x = torch.randn(15, 192).to(dtype)
    x[3, 7], x[14, 39], x[5] = math.nan, math.inf, 0
    bias = torch.randn(203).to(dtype)
    out = a_product(a_weight(Scheme(8)), bias, activations)(x)
    assert out[3].isnan().all() and not out[14].isfinite().any()
    assert out[[row for row in range(15) if row not in (3, 14)]].isfinite().all() and torch.equal(out[5], bias)


def test_other_shapes_and_dtypes_are_multiplied_too() -> None:
    weight = a_weight(Scheme(8))
    product = a_product(weight)
    for x in (torch.randn(2, 3, 192), torch.randn(192, 5).mT, torch.randn(192), torch.randn(0, 192)):
        torch.testing.assert_close(product(x), x @ dequantise(weight).T, rtol=1e-5, atol=1e-5)
    assert product(torch.randn(2, 192).double()).dtype is torch.float64
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        product(torch.randn(2, 191))
    with pytest.raises(RuntimeError, match="x is on meta"):
        product(torch.empty(2, 192, device="meta"))


def test_what_c_does_not_support_is_left_to_the_reference(monkeypatch) -> None:
    for scheme in (Scheme(8, codes="float8_e4m3fn"), Scheme(4, True, "group", 24)):
        assert pack_quantised(a_weight(scheme), None) is None
    monkeypatch.setattr("paged_infer.kernels.cpu.quant.unavailable_reason", lambda: "no compiler")
    assert pack_quantised(a_weight(Scheme(8)), None) is None


def test_each_processor_gives_the_reference_and_keeps_the_bits_of_a_row(processor) -> None:  # noqa: F811
    torch.manual_seed(0)
    for scheme in (Scheme(8), Scheme(8, False, "group", 32), Scheme(4, True, "group", 64)):
        for dtype in TOLERANCE:
            for activations in (None, "int8"):
                weight = a_weight(scheme)
                x, bias = torch.randn(17, 192).to(dtype), torch.randn(203)
                product = a_product(weight, bias, activations)
                out = assert_right(product, x, weight, bias)
                for row in (0, 8, 16):
                    assert torch.equal(product(x[row : row + 1])[0], out[row])
