"""Rounding to nearest changes a weight by at most half a step of its group's grid, in any scheme."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paged_infer.kernels.quant.weight import dequantise
from paged_infer.model.quant.scheme import Scheme, encode, grid, quantise, rounded

INT_SCHEMES = (
    st.builds(Scheme, st.integers(2, 8), st.booleans(), st.sampled_from(["tensor", "channel"]))
    | st.builds(Scheme, st.integers(2, 8), st.booleans(), st.just("group"), st.sampled_from([1, 2, 4, 12]))
    | st.builds(Scheme, st.integers(2, 8), narrow_range=st.just(True))
)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """[N, 12] or, where no group size divides, [N, 7]; with outliers, rows of zeros and rows of one sign."""
    rows = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    weight = torch.randn(rows, 12, generator=generator) * 10.0 ** draw(st.integers(-6, 6))
    weight[0, 3] *= draw(st.sampled_from([0.0, 1.0, 100.0]))
    return weight * draw(st.sampled_from([0.0, 1.0])) if draw(st.booleans()) else weight.abs()


@given(matrices(), INT_SCHEMES)
def test_each_weight_moves_by_half_a_step_at_most(weight: Tensor, scheme: Scheme) -> None:
    coded = quantise(weight, scheme)
    step = coded.scales.repeat_interleave(coded.group_size, dim=1)
    assert ((dequantise(coded) - weight).abs() <= step * 0.5001).all()


@given(matrices(), INT_SCHEMES)
def test_zeros_stay_zeros(weight: Tensor, scheme: Scheme) -> None:
    weight[:, ::2] = 0
    assert (rounded(weight, scheme)[:, ::2] == 0).all()


@given(matrices(), INT_SCHEMES)
def test_what_lies_on_the_grid_is_coded_without_error(weight: Tensor, scheme: Scheme) -> None:
    on_grid = rounded(weight, scheme)
    assert torch.equal(dequantise(encode(on_grid, *grid(weight, scheme), scheme)), on_grid)


@given(matrices(), st.sampled_from(["float8_e4m3fn", "float8_e5m2"]), st.sampled_from(["tensor", "channel"]))
def test_float8_keeps_its_relative_precision(weight: Tensor, codes: str, strategy: str) -> None:
    scheme = Scheme(8, True, strategy, codes=codes)
    coded = quantise(weight, scheme)
    assert coded.values.dtype == scheme.float_dtype
    info = torch.finfo(scheme.float_dtype)
    allowed = torch.maximum(weight.abs() * info.eps / 2, coded.scales * info.smallest_normal * info.eps / 2)
    assert ((dequantise(coded) - weight).abs() <= allowed * 1.0001).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_code_is_used_but_perhaps_an_end(bits: int, symmetric: bool) -> None:
    weight = torch.linspace(-1.0, 1.0, 2**bits * 4)[None]  # both ends lie halfway between two codes
    assert len(rounded(weight, Scheme(bits, symmetric)).unique()) >= 2**bits - 1


def test_four_bits_are_packed_and_an_odd_row_is_not() -> None:
    assert quantise(torch.randn(3, 8), Scheme(4)).values.shape == (3, 4)
    odd = quantise(torch.randn(3, 7), Scheme(4, symmetric=False))
    assert odd.values.dtype == torch.int8 and dequantise(odd).shape == (3, 7)


def test_a_tensor_shares_one_scale_and_a_group_has_its_own() -> None:
    weight = torch.tensor([[1.0, 2.0, 4.0, -8.0], [0.5, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(grid(weight, Scheme(8, True, "tensor"))[0] * 127.5, torch.full((2, 1), 8.0))
    scales, zeros = grid(weight, Scheme(8, True, "group", 2))
    assert zeros is None
    torch.testing.assert_close(scales * 127.5, torch.tensor([[2.0, 8.0], [0.5, 127.5]]))  # 127.5: scale 1


def test_an_asymmetric_scale_is_rounded_once_and_stays_finite() -> None:
    weight = (torch.randn(500, 32) / 7).bfloat16().float()  # many lie halfway between two codes
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    assert torch.equal(grid(weight, Scheme(4, False))[0], (high - low) / 15)
    largest = torch.finfo(torch.float32).max
    assert grid(torch.tensor([[-largest, largest]]), Scheme(4, False))[0].isfinite().all()


def test_a_narrow_range_has_as_many_codes_below_zero_as_above() -> None:
    coded = quantise(torch.tensor([[-3.5, 1.0, 0.2, 3.0]]), Scheme(4, narrow_range=True))
    assert coded.scales.tolist() == [[0.5]]
    assert dequantise(coded).tolist() == [[-3.5, 1.0, 0.0, 3.0]]


def test_a_group_size_that_does_not_divide_is_refused_with_those_that_would() -> None:
    with pytest.raises(ValueError, match="group_size=40: does not divide the 192 columns of mlp; 32 or 48 would"):
        quantise(torch.zeros(1, 192), Scheme(4, True, "group", 40), "mlp")
    with pytest.raises(ValueError, match=r"group_size=400: .*; 192 would"):
        quantise(torch.zeros(1, 192), Scheme(4, True, "group", 400))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinite_weights_are_refused_by_name(value: float) -> None:
    weight = torch.zeros(2, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="mlp: has values that are infinite or NaN"):
        quantise(weight, Scheme(8), "mlp")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 4, "strategy": "block"}, "strategy='block'"),
        ({"bits": 4, "strategy": "group"}, "group_size=None"),
        ({"bits": 4, "group_size": 32}, "group_size=32"),
        ({"bits": 4, "strategy": "group", "group_size": 0}, "group_size=0"),
        ({"bits": 4, "codes": "float8_e5m2"}, "codes='float8_e5m2'"),
        ({"bits": 8, "codes": "float8_e4m3fn", "symmetric": False}, "codes='float8_e4m3fn'"),
        ({"bits": 8, "codes": "nf4"}, "codes='nf4'"),
        ({"bits": 4, "symmetric": False, "narrow_range": True}, "narrow_range=True"),
        ({"bits": 8, "codes": "float8_e5m2", "narrow_range": True}, "narrow_range=True"),
    ],
)
def test_an_invalid_scheme_is_refused(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Scheme(**options)


def test_bits_per_weight_count_scales_and_zeros() -> None:
    assert Scheme(4, False, "group", 32).bits_per_weight(192) == 4 + (16 + 4) / 32
    assert Scheme(8, True, "tensor").bits_per_weight(192) == 8
