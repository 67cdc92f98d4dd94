"""silu_mul equals its reference and float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_infer.kernels.fused.silu_mul import silu_mul, silu_mul_reference

# bfloat16: the interpreter cuts off where a GPU rounds, so each of two roundings may be an ulp away.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2 * 2**-7}


@given(
    num_tokens=st.integers(0, 4),
    width=st.sampled_from([0, 1, 5, 96, 512, 1500]),
    dtype=st.sampled_from(list(TOLERANCE)),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_the_kernel_equals_its_reference_and_float64(num_tokens, width, dtype, scale, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    wide = (torch.randn(num_tokens, 3 * width, generator=rng) * scale).to(dtype)
    gate_up = wide[:, width:]  # rows are apart
    gate, up = gate_up.double()[:, :width], gate_up.double()[:, width:]
    out = silu_mul(gate_up)
    assert out.shape == (num_tokens, width) and out.dtype == dtype
    for expected in (silu_mul_reference(gate_up).double(), gate * torch.sigmoid(gate) * up):
        torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_gates_far_from_zero_overflow_nowhere() -> None:
    gates = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 1e4, torch.nan])
    out = silu_mul(torch.cat((gates, torch.ones(7)))[None])[0]
    torch.testing.assert_close(out, torch.tensor([0, 0, 0, 0, 90.0, 1e4, torch.nan]), equal_nan=True)


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (torch.ones(2, 7), r"got \[2, 7\]"),
        (torch.ones(8), r"got \[8\]"),
        (torch.ones(2, 8, dtype=torch.int32), "got torch.int32"),
        (torch.ones(2, 8, dtype=torch.float64), "got torch.float64"),
        (torch.ones(8, 2).mT, r"strides \(1, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shape(gate_up, message) -> None:
    with pytest.raises(ValueError, match=message):
        silu_mul(gate_up)
