"""A packed matrix multiplies as the plain one does; in C, the bits of a row do not depend on the other rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_infer.kernels.cpu.build import unavailable_reason
from paged_infer.kernels.cpu.linear import Pack, PanelProduct, pack_c, pack_onednn
from paged_infer.kernels.op_sets import C_OPS, TORCH_OPS, TRITON_OPS
from paged_infer.model.linear import DENSE, Linear, PackedMethod

needs_c = pytest.mark.skipif(unavailable_reason() is not None, reason=f"no C kernels: {unavailable_reason()}")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")


def a_linear(
    width: int, height: int, pack: Pack | None = None, bias: bool = True, dtype: torch.dtype = torch.float32
) -> Linear:
    """Weights as ``nn.Linear`` initialises them."""
    linear = Linear(width, height, bias, DENSE if pack is None else PackedMethod(pack))
    linear.load_state_dict(torch.nn.Linear(width, height, bias).state_dict())
    linear = linear.to(dtype)
    linear.method.prepack(linear)
    return linear


def a_tolerance(dtype: torch.dtype, width: int) -> dict[str, float]:
    """Rounding of the sum, and in bfloat16 of the result."""
    return {"rtol": 1e-5 if dtype is torch.float32 else 2**-8 * 1.01, "atol": 1e-5 * math.sqrt(width)}


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    rows=st.sampled_from([0, 1, 2, 5, 6, 7, 11, 12, 13, 15, 16, 17, 23, 24, 25, 32, 33, 70, 241, 257, 300]),
    width=st.sampled_from([1, 3, 24, 192, 1023, 1024, 1025]),
    height=st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 64, 203]),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=120, deadline=None)
def test_panels_equal_the_plain_product(dtype, rows, width, height, has_bias, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(height, width, generator=rng).to(dtype)
    bias = torch.randn(height, generator=rng).to(dtype) if has_bias else None
    x = torch.randn(rows, 2 * width, generator=rng).to(dtype)[:, width:]  # rows are apart
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    ours = PanelProduct.of(weight, bias)(x)
    assert ours.dtype is dtype
    torch.testing.assert_close(ours.double(), exact, **a_tolerance(dtype, width))


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    sizes=st.tuples(st.integers(1, 300), st.sampled_from([24, 640, 2048]), st.sampled_from([80, 203])),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_a_row_has_the_same_bits_alone_in_a_crowd_and_on_two_threads(dtype, sizes, seed) -> None:
    rows, width, height = sizes
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=rng).to(dtype)
    product = PanelProduct.of(torch.randn(height, width, generator=rng).to(dtype), None)
    together = product(x)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(product(x[row : row + 1])[0], together[row])
    usual = torch.get_num_threads()
    torch.set_num_threads(3 - min(usual, 2))
    try:
        assert torch.equal(product(x), together)
    finally:
        torch.set_num_threads(usual)


@needs_c
@pytest.mark.parametrize("rows", [2049, 1500])
def test_a_prompts_rows_have_the_bits_that_they_have_alone_where_the_result_is_too_large_for_the_cache(rows) -> None:
    x = torch.randn(rows, 64).bfloat16()
    product = PanelProduct.of(torch.randn(1024, 64).bfloat16(), torch.randn(1024).bfloat16())
    together = product(x)
    for row in (0, 17, 255, 256, rows - 17, rows - 1):
        assert torch.equal(product(x[row : row + 1])[0], together[row])


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_in_their_rows(dtype) -> None:
    x = torch.ones(15, 40, dtype=dtype)
    x[3, 7], x[14, 39] = math.nan, math.inf
    out = PanelProduct.of(torch.ones(50, 40, dtype=dtype), None)(x)
    assert out.isnan().any(1).nonzero().flatten().tolist() == [3]
    assert out.isinf().all(1).nonzero().flatten().tolist() == [14]


@needs_c
def test_what_c_does_not_take_is_multiplied_all_the_same() -> None:
    product = PanelProduct.of(torch.randn(33, 24), torch.randn(33))
    for x in (torch.randn(2, 3, 24), torch.randn(24, 5).mT, torch.randn(24)):
        torch.testing.assert_close(product(x), F.linear(x, product.weight, product.bias))


@needs_c
@pytest.mark.parametrize("width", [0, 12, 23, 25])
def test_rows_of_another_width_are_refused_as_the_plain_product_refuses_them(width) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        PanelProduct.of(torch.randn(33, 24), None)(torch.randn(2, width))


@needs_c
def test_of_no_columns_the_bias_is_left() -> None:
    bias = torch.arange(40.0)
    for rows in (0, 1, 13):
        out = PanelProduct.of(torch.empty(40, 0), bias)(torch.empty(rows, 0))
        assert torch.equal(out, bias.expand(rows, 40))


@needs_c
@pytest.mark.parametrize("usual", [torch.bfloat16, torch.float64])
def test_the_result_is_float32_whatever_dtype_the_process_makes_tensors_of(usual) -> None:
    """One of a smaller dtype would be written past its end."""
    product = PanelProduct.of(torch.randn(33, 1024), None)
    x = torch.randn(13, 1024)
    before = product(x)
    torch.set_default_dtype(usual)
    try:
        after = product(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert after.dtype is torch.float32 and torch.equal(after, before)


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "height", "packed"),
    [(1, 192, 1003, True), (7, 24, 80, False), (33, 640, 192, True), (300, 500, 203, True), (300, 5, 3, False)],
)
def test_onednns_layout_equals_the_plain_product_where_it_is_worth_it(rows, width, height, packed, bias) -> None:
    torch.manual_seed(rows)
    linear = a_linear(width, height, bias=bias)
    product = pack_onednn(linear.weight, linear.bias)
    assert (product is not None) == packed
    if product is not None:
        with torch.inference_mode():
            for x in (torch.randn(rows, width), torch.randn(rows, 2 * width)[:, ::2]):
                plain = F.linear(x, linear.weight, linear.bias)
                torch.testing.assert_close(product(x), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pack", [pack_c, pack_onednn])
def test_bfloat16_is_packed_where_it_can_be_multiplied_and_stays_what_it_was(pack) -> None:
    torch.manual_seed(0)
    linear = a_linear(400, 400, pack, dtype=torch.bfloat16)
    x = torch.randn(33, 400, dtype=torch.bfloat16)
    can = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (linear.product is not None) == (can or (pack is pack_c and unavailable_reason(torch.bfloat16) is None))
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    with torch.inference_mode():
        torch.testing.assert_close(linear(x).double(), exact, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("pack", [pack_c, pack_onednn])
def test_float16_is_not_packed(pack) -> None:
    linear = a_linear(400, 400, pack, dtype=torch.float16)
    assert linear.product is None


def test_without_a_compiler_c_leaves_it_to_onednn(monkeypatch) -> None:
    monkeypatch.setattr("paged_infer.kernels.cpu.linear.unavailable_reason", lambda dtype: "no compiler")
    linear = a_linear(400, 400, pack_c)
    assert not isinstance(linear.product, PanelProduct)
    x = torch.randn(3, 400)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x), F.linear(x, linear.weight, linear.bias), rtol=1e-5, atol=1e-5)


def test_each_set_of_pieces_says_how_matrices_are_laid_out() -> None:
    assert (C_OPS.pack, TORCH_OPS.pack, TRITON_OPS.pack) == (pack_c, pack_onednn, pack_onednn)
