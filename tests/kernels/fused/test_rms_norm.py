"""add_rms_norm equals its reference, a float64 norm, and the model's own layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from paged_infer.kernels.fused.rms_norm import add_rms_norm, add_rms_norm_reference

# bfloat16: the interpreter cuts off where a GPU rounds, so each of two roundings may be an ulp away.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2 * 2**-7}


def in_float64(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    total = x.double() if residual is None else (x + residual).double()
    rows = [row / ((row @ row) / len(row) + eps).sqrt() * (weight.double() + offset) for row in total]
    return torch.stack(rows) if rows else total, total


@given(
    num_tokens=st.integers(0, 4),
    width=st.sampled_from([1, 3, 24, 64, 192, 768]),
    has_residual=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    offset=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_the_kernel_equals_its_reference_and_float64(num_tokens, width, has_residual, dtype, scale, offset, seed):
    rng = torch.Generator().manual_seed(seed)
    wide = (torch.randn(num_tokens, 3 * width, generator=rng) * scale).to(dtype)
    x, residual = wide[:, :width], wide[:, 2 * width :] if has_residual else None  # rows are apart
    weight = (1 + 0.2 * torch.randn(width, generator=rng)).to(dtype)
    before = wide.clone()
    normed, total = add_rms_norm(x, residual, weight, 1e-6, offset)
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    for expected in (add_rms_norm_reference, in_float64):
        expected_norm, expected_total = expected(x, residual, weight, 1e-6, offset)
        torch.testing.assert_close(normed.double(), expected_norm.double(), **tolerance)
        torch.testing.assert_close(total.double(), expected_total.double(), **tolerance)
    assert normed.dtype == total.dtype == dtype and normed.is_contiguous()
    assert torch.equal(wide, before) and (has_residual or total is x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_equals_the_models_norm(dtype: torch.dtype) -> None:
    norm = Qwen3RMSNorm(96, 1e-5)
    torch.nn.init.normal_(norm.weight, 1.0, 0.1)
    norm = norm.to(dtype)
    x = torch.randn(5, 96).to(dtype)
    normed, _ = add_rms_norm(x, None, norm.weight.detach(), 1e-5)
    torch.testing.assert_close(normed, norm(x).detach(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_with_an_offset_of_1_the_kernel_equals_gemmas_norm(dtype: torch.dtype) -> None:
    norm = Gemma3RMSNorm(96, 1e-5)
    torch.nn.init.normal_(norm.weight, 0.3, 0.5)
    norm, x = norm.to(dtype), torch.randn(5, 96).to(dtype)
    for op in (add_rms_norm, add_rms_norm_reference):
        normed, _ = op(x, None, norm.weight.detach(), 1e-5, 1.0)
        torch.testing.assert_close(normed, norm(x).detach(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_float16_is_rounded_where_torch_rounds() -> None:
    """A fused norm that kept float32 until the end would be nearer to the truth, and not the model."""
    x, residual = (torch.randn(2, 4, 512) * 3).half()
    weight = torch.randn(512).half()
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    expected, expected_total = add_rms_norm_reference(x, residual, weight, 1e-6)
    assert torch.equal(total, expected_total)
    assert (normed != expected).float().mean() < 0.01  # the last bit of a mean, here and there


def test_a_row_of_nan_spoils_no_other() -> None:
    x = torch.ones(3, 8)
    x[1] = torch.nan
    normed, _ = add_rms_norm(x, torch.zeros(3, 8), torch.ones(8), 1e-6)
    assert normed[1].isnan().all() and normed[[0, 2]].isfinite().all()


GOOD: dict[str, Any] = {"x": torch.ones(3, 8), "residual": torch.ones(3, 8), "weight": torch.ones(8), "eps": 1e-6}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.ones(8), "residual": None}, r"x \[8\]"),
        ({"residual": torch.ones(2, 8)}, r"residual \[2, 8\]"),
        ({"weight": torch.ones(9)}, r"weight \[9\]"),
        ({"x": torch.ones(1, 0), "residual": None, "weight": torch.ones(0)}, r"hidden 1\.\.16384; got x \[1, 0\]"),
        ({"residual": torch.ones(3, 8).half()}, "residual torch.float16"),
        ({"weight": torch.ones(8, device="meta")}, "weight torch.float32 on meta"),
        ({"x": torch.ones(3, 8).double(), "residual": None, "weight": torch.ones(8).double()}, "x torch.float64"),
        ({"x": torch.ones(8, 3).mT}, r"strides \(1, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shape(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        add_rms_norm(**{**GOOD, **wrong})
