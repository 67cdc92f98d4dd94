"""Triton products with quantised weights: equal to the definition, to the reference's rounding of x, in any batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from captured import Recorder

from paged_infer.kernels.op_sets import TRITON_OPS
from paged_infer.kernels.quant import gemm
from paged_infer.kernels.quant.gemm import TritonProduct, pack_triton
from paged_infer.kernels.quant.product import float8_tokens, int8_tokens, quantised_linear
from paged_infer.kernels.quant.rounding import round_tokens
from paged_infer.kernels.quant.weight import QuantisedWeight, dequantise
from paged_infer.model.quant.scheme import Scheme, quantise

FLOAT8 = "float8_e4m3fn"
# scheme, columns, what x is rounded to -> form
CASES = {
    "int4": (Scheme(4), 150, None, "int4"),
    "int4, groups of 32": (Scheme(4, strategy="group", group_size=32), 160, None, "int4"),
    "int4, zeros": (Scheme(4, symmetric=False, strategy="group", group_size=64), 192, None, "int4"),
    "int8": (Scheme(8), 150, None, "int8"),
    "int8, zeros, groups of 16": (Scheme(8, symmetric=False, strategy="group", group_size=16), 80, None, "int8"),
    "int3": (Scheme(3, strategy="group", group_size=48), 96, None, "int8"),
    "float8": (Scheme(8, codes=FLOAT8), 150, None, "float8"),
    "float8, blocks": (Scheme(8, strategy="group", group_size=128, codes=FLOAT8), 256, None, "float8"),
    "W8A8": (Scheme(8), 300, "int8", "none"),
    "W8A8, one scale": (Scheme(8, strategy="tensor"), 130, "int8", "none"),
    "float8 x float8": (Scheme(8, codes=FLOAT8), 300, "float8", "none"),
    "float8 x float8, blocks": (Scheme(8, strategy="group", group_size=128, codes=FLOAT8), 256, "float8", "none"),
}
EACH_CASE = pytest.mark.parametrize("case", CASES)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a_product(
    case: str, height: int = 20, has_bias: bool = True
) -> tuple[TritonProduct, QuantisedWeight, torch.Tensor]:
    """The product, W, and the bias."""
    scheme, columns, activations, form = CASES[case]
    weight, bias = quantise(random(height, columns), scheme), random(height, seed=1)
    product = pack_triton(weight, bias if has_bias else None, activations)
    assert product is not None and product.form == form
    return product, weight, bias if has_bias else torch.zeros(height)


def in_float64(x: torch.Tensor, weight: QuantisedWeight, bias: torch.Tensor, activations: str | None) -> torch.Tensor:
    """x W^T + b by its definition, with x rounded where ``activations`` says so."""
    exact = x.double()
    if activations is not None:
        codes, scales = (int8_tokens if activations == "int8" else float8_tokens)(x)
        exact = codes.double() * scales.double()
    return exact @ dequantise(weight).double().T + bias.double()


@EACH_CASE
def test_each_form_of_weights_equals_the_definition_in_float64(case: str) -> None:
    product, weight, bias = a_product(case, height=70)
    assert product.splits > 1
    x = random(5, 2 * weight.shape[1], seed=2)[:, weight.shape[1] :]  # rows are apart
    out = product(x)
    torch.testing.assert_close(out.double(), in_float64(x, weight, bias, product.activations), rtol=1e-5, atol=2e-5)
    assert torch.equal(product(x[:4].unflatten(0, (2, 2))), out[:4].unflatten(0, (2, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["int4, zeros", "int4, groups of 32", "float8, blocks", "W8A8", "float8 x float8"])
def test_half_precision_rounds_the_result_alone(case: str, dtype: torch.dtype) -> None:
    """Codes are exact in every dtype, and sums are float32: the error is that of one rounding (which the interpreter
    truncates in bfloat16)."""
    product, weight, bias = a_product(case)
    x = random(3, weight.shape[1]).to(dtype)
    out, exact = product(x), in_float64(x, weight, bias, product.activations)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("case", ["W8A8", "W8A8, one scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_integers_give_the_bits_of_the_reference(case: str, dtype: torch.dtype) -> None:
    product, weight, bias = a_product(case)
    x = random(4, weight.shape[1]).to(dtype)
    assert torch.equal(product(x), quantised_linear(x, weight, bias, "int8"))


@pytest.mark.parametrize("case", ["int8", "int4, zeros", "float8 x float8, blocks"])
def test_it_is_near_the_reference(case: str) -> None:
    product, weight, bias = a_product(case)
    x = random(4, weight.shape[1])
    expected = quantised_linear(x, weight, bias, product.activations)
    torch.testing.assert_close(product(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", ["int4", "int8, zeros, groups of 16", "W8A8, one scale", "float8 x float8, blocks"])
def test_a_row_has_the_same_bits_alone_and_in_any_crowd(case: str) -> None:
    """Up to 64 rows, each split has programs of its own; beyond, one program computes all splits."""
    product, weight, _ = a_product(case)
    x = random(70, weight.shape[1])
    together = product(x)
    for rows in (slice(0, 1), slice(50, 70)):
        assert torch.equal(product(x[rows]), together[rows])
    loud = torch.cat((x[:1], 1e4 * x[1:3]))
    assert torch.equal(product(loud)[0], together[0])


def test_columns_that_are_stored_in_another_order_meet_their_own_column_of_x() -> None:
    weight = quantise(random(9, 64), Scheme(4, strategy="group", group_size=16))
    mixed = replace(weight, columns=torch.randperm(64, generator=torch.Generator().manual_seed(1)))
    x = random(3, 64)
    out = pack_triton(mixed, None)(x)
    torch.testing.assert_close(out.double(), in_float64(x, mixed, torch.zeros(9), None), rtol=1e-5, atol=1e-5)


def test_zeros_between_codes_are_kept_as_gguf_needs_them() -> None:
    whole = quantise(random(9, 64), Scheme(4, symmetric=False, strategy="group", group_size=32))
    weight = replace(whole, zeros=whole.zeros + 0.3)
    x = random(3, 64)
    out = pack_triton(weight, None)(x)
    torch.testing.assert_close(out.double(), in_float64(x, weight, torch.zeros(9), None), rtol=1e-5, atol=1e-5)


def test_a_chip_without_float8_products_rounds_x_and_decodes_both(monkeypatch) -> None:
    monkeypatch.setattr(gemm, "capability", lambda device: (8, 0))
    scheme, columns, activations, _ = CASES["float8 x float8, blocks"]
    weight, x = quantise(random(20, columns), scheme), random(3, columns, seed=1)
    product = pack_triton(weight, None, activations)
    assert product.form == "float8" and product.kernel == "w8a16"
    exact = in_float64(x, weight, torch.zeros(20), activations)
    torch.testing.assert_close(product(x).double(), exact, rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_nan_or_an_infinity_stays_in_its_row() -> None:
    for case in ("int4, zeros", "W8A8", "float8 x float8"):
        product, weight, _ = a_product(case)
        x = random(4, weight.shape[1])
        clean = product(x)
        x[1, 3], x[2, 5] = math.nan, math.inf
        out = product(x)
        assert not out[1:3].isfinite().any()
        assert torch.equal(out[::3], clean[::3])


def test_a_graph_holds_each_product_and_follows_its_x() -> None:
    for case in ("int4, zeros", "W8A8, one scale"):
        product, weight, _ = a_product(case)
        x = random(2, weight.shape[1])
        out = torch.empty(2, 20)
        replay = Recorder()(lambda: out.copy_(product(x)))  # noqa: B023
        x.copy_(random(2, weight.shape[1], seed=5))
        replay()
        assert torch.equal(out, product(x))


# -- x, rounded -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activations", "reference"), [("int8", int8_tokens), ("float8", float8_tokens)])
def test_tokens_are_rounded_to_the_bits_of_the_reference(activations, reference) -> None:
    """Ties, rows of zeros, of tiny and of huge values, of every float8, and rows with a larger stride.

    The interpreter reads tiny bfloat16 values wrongly.
    """
    x = random(9, 2 * 1500)[:, 1500:]
    x[0] = torch.arange(1500).remainder(255) / 2 - 63.5  # every second one is a tie
    x[1] = 0
    x[2] *= 1e-38
    x[3] *= 1e37
    x[4] = torch.linspace(-448, 448, 1500) / 2 ** torch.arange(1500).remainder(20)
    x[5, :256] = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num()
    for some in (x, x[:, :700], x[3:].bfloat16(), x[4:].half()):
        codes, scales = round_tokens(some, activations)
        expected, expected_scales = reference(some)
        assert torch.equal(scales, expected_scales)
        assert codes.dtype == expected.dtype and torch.equal(codes.float(), expected.float())


# -- Choice and errors ----------------------------------------------------------------------------------------------


def test_it_is_what_the_triton_backend_multiplies_by() -> None:
    assert TRITON_OPS.pack_quantised is pack_triton


def test_what_the_kernel_does_not_support_is_left_to_the_reference() -> None:
    groups_of_8 = quantise(random(8, 64), Scheme(4, strategy="group", group_size=8))
    assert pack_triton(groups_of_8, None) is None
    assert pack_triton(quantise(random(8, 64), Scheme(8, codes="float8_e5m2")), None) is None
    grouped = quantise(random(8, 64), Scheme(8, strategy="group", group_size=32))
    assert pack_triton(grouped, None) is not None
    assert pack_triton(grouped, None, "int8") is None  # each group's sum would have to become a float
    assert pack_triton(quantise(random(8, 64), Scheme(4)), None, "int8") is None
    assert pack_triton(quantise(random(8, 64), Scheme(8)), None, "float8") is None
    float8 = quantise(random(8, 64), Scheme(8, codes=FLOAT8))
    float8.values.view(torch.uint8)[3, 5] = 0x7F  # NaN, which the kernel would decode as 480
    assert pack_triton(float8, None) is None


def test_an_x_that_does_not_fit_is_refused() -> None:
    product, *_ = a_product("int4")
    for x in (torch.ones(2, 149), torch.ones(2, 150, dtype=torch.int8), torch.ones(2, 150, device="meta")):
        with pytest.raises(ValueError, match=r"x \[2, .*\] of .* does not fit W \[20, 150\] on cpu"):
            product(x)
    assert product(torch.ones(0, 150)).shape == (0, 20)
