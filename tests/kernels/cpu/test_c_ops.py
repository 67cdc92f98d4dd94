"""Each C function equals its reference, rows apart and odd widths included; what it cannot do, the reference does."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_infer.kernels.cpu.build import unavailable_reason
from paged_infer.kernels.op_sets import C_OPS, TORCH_OPS

if unavailable_reason() is not None:
    pytest.skip(f"the C kernels cannot be built: {unavailable_reason()}", allow_module_level=True)

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
ONE_ROUNDING = {"atol": 1e-6, "rtol": 2**-8}  # of a float32 to bfloat16
WIDTHS = st.sampled_from([1, 2, 3, 24, 64, 192, 769])


@given(
    st.integers(0, 40),
    WIDTHS,
    st.booleans(),
    st.sampled_from([1e-3, 1.0, 50.0]),
    st.sampled_from([0, 1]),
    st.integers(0, 99),
)
@settings(max_examples=60)
def test_the_norm_equals_its_reference(num_tokens, width, has_residual, scale, offset, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    wide = torch.randn(num_tokens, 3 * width, generator=rng) * scale
    before = wide.clone()
    x, residual = wide[:, :width], wide[:, 2 * width :] if has_residual else None  # rows are apart
    weight = 1 + 0.2 * torch.randn(width, generator=rng)
    both = (ops.add_rms_norm(x, residual, weight, 1e-6, offset) for ops in (C_OPS, TORCH_OPS))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert torch.equal(wide, before)


@given(st.integers(0, 40), WIDTHS, st.sampled_from([1e-3, 1.0, 50.0, 1e18]), st.integers(0, 99))
@settings(max_examples=60)
def test_silu_mul_equals_its_reference_however_large_the_gate(num_tokens, width, scale, seed) -> None:
    wide = torch.randn(num_tokens, 4 * width, generator=torch.Generator().manual_seed(seed)) * scale
    gate_up = wide[:, width : 3 * width]
    torch.testing.assert_close(C_OPS.silu_mul(gate_up), TORCH_OPS.silu_mul(gate_up), **CLOSE)


@given(
    num_tokens=st.integers(0, 40),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (7, 7)]),
    dim=st.sampled_from([2, 8, 24, 64, 80]),
    has_norm=st.booleans(),
    norm_offset=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_rotated_heads_equal_the_references(num_tokens, heads, dim, has_norm, norm_offset, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    num_all = num_heads + 2 * num_kv_heads
    qkv = torch.randn(num_tokens, num_all + 1, dim, generator=rng)[:, :num_all]  # rows are apart
    cos, sin = torch.randn(2, num_tokens, 1, dim, generator=rng)
    norm = {"norm_weight": torch.rand(num_heads + num_kv_heads, dim, generator=rng)} if has_norm else {}
    named = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "eps": 1e-5, "norm_offset": norm_offset, **norm}
    ours, theirs = (ops.qk_norm_rope(qkv, cos, sin, **named) for ops in (C_OPS, TORCH_OPS))
    torch.testing.assert_close(ours, theirs, **CLOSE)


@given(st.integers(0, 9), st.sampled_from([1, 3, 16]), st.integers(0, 99))
@settings(max_examples=30)
def test_rows_go_to_their_slots_and_none_to_minus_one(num_tokens, block_size, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    qkv = torch.randn(num_tokens, 8, 24, generator=rng)
    slots = torch.randperm(10 * block_size, generator=rng)[:num_tokens]
    slots[::3] = -1
    caches = [torch.full((2, 10, block_size, 2, 24), math.nan) for _ in (C_OPS, TORCH_OPS)]
    for cache, ops in zip(caches, (C_OPS, TORCH_OPS), strict=True):
        ops.store_kv(qkv[:, 4:6], qkv[:, 6:], cache[0], cache[1], slots)
    torch.testing.assert_close(*caches, equal_nan=True, rtol=0, atol=0)


@given(
    num_tokens=st.integers(0, 9),
    has_norm=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_keys_and_values_are_stored_on_the_way(num_tokens, has_norm, dtype, seed) -> None:
    """Keys as they are returned, values as they came; nothing else in the cache is touched."""
    rng = torch.Generator().manual_seed(seed)
    qkv = torch.randn(num_tokens, 9, 24, generator=rng).to(dtype)[:, :8]  # rows are apart
    cos, sin = torch.randn(2, num_tokens, 1, 24, generator=rng).to(dtype)
    weight = torch.rand(6, 24, generator=rng).to(dtype) if has_norm else None
    slots = torch.randperm(12, generator=rng)[:num_tokens]
    slots[::3] = -1
    keys, values = torch.full((2, 4, 3, 2, 24), math.nan, dtype=dtype)
    named = {"num_heads": 4, "num_kv_heads": 2, "norm_weight": weight, "slot_mapping": slots}
    qk = C_OPS.qk_norm_rope(qkv, cos, sin, k_cache=keys, v_cache=values, **named)
    del named["slot_mapping"]
    assert torch.equal(qk, C_OPS.qk_norm_rope(qkv, cos, sin, **named))
    expected = torch.full((2, 12, 2, 24), math.nan, dtype=dtype)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[0, slot], expected[1, slot] = qk[token, 4:], qkv[token, 6:]
    for cache, one in zip((keys, values), expected, strict=True):
        torch.testing.assert_close(cache.flatten(0, 1), one, equal_nan=True, rtol=0, atol=0)


def test_nan_stays_nan_and_in_its_row() -> None:
    x = torch.ones(3, 8)
    x[1, 5] = math.nan
    assert C_OPS.add_rms_norm(x, None, torch.ones(8), 1e-6)[0].isnan().any(1).tolist() == [False, True, False]
    assert C_OPS.silu_mul(x).isnan().sum(1).tolist() == [0, 1, 0]
    rotated = C_OPS.qk_norm_rope(x.view(3, 4, 2), *torch.ones(2, 3, 1, 2), num_heads=2, num_kv_heads=1)
    assert rotated.isnan().flatten(1).any(1).tolist() == [False, True, False]


@given(
    num_rows=st.integers(0, 9),
    width=st.sampled_from([1, 2, 63, 64, 65, 1755]),
    levels=st.sampled_from([2, 50, 10**6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
@settings(max_examples=120)
def test_the_largest_and_of_equals_the_first_is_found(num_rows, width, levels, dtype, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    wide = (torch.randint(0, levels, (num_rows, 2 * width), generator=rng) - levels / 2).to(dtype)
    logits = wide[:, width:]  # rows are apart
    strange = torch.tensor([math.inf, -math.inf, -0.0, 0.0, 1e-42]).to(dtype)
    where = torch.rand(logits.shape, generator=rng) < 0.05
    logits[where] = strange[torch.randint(0, 5, logits.shape, generator=rng)][where]
    values, places = C_OPS.argmax(logits)
    assert places.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert values.dtype is dtype and torch.equal(values, logits.gather(1, places[:, None])[:, 0])


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_a_row_with_nan_says_so_wherever_it_is(nan) -> None:
    for place in (0, 70, 199):
        logits = torch.full((3, 200), math.inf)
        logits[1, place] = torch.tensor(math.copysign(1.0, nan)) * torch.tensor(math.nan)
        for ops in (C_OPS, TORCH_OPS):
            assert ops.argmax(logits)[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 300])
def test_masked_logits_are_minus_infinity_and_the_others_keep_their_bits(dtype, width) -> None:
    rng = torch.Generator().manual_seed(width)
    logits = torch.randn(5, 2 * width, generator=rng).to(dtype)[:, width:]  # rows are apart
    logits[1, 0] = math.nan
    masks = torch.randint(-(2**31), 2**31 - 1, (5, -(-width // 32)), generator=rng, dtype=torch.int32)
    masks[3], masks[4] = 0, -1
    before, found = logits.clone(), C_OPS.mask_logits(logits, masks)
    for row in range(5):
        for i in range(width):
            allowed = int(masks[row, i // 32]) >> i % 32 & 1
            expected = logits[row, i] if allowed else torch.tensor(-math.inf)
            assert torch.equal(found[row, i].float(), expected.float()) or bool(
                found[row, i].isnan() & expected.isnan()
            )
    assert torch.equal(found.nan_to_num(7), TORCH_OPS.mask_logits(logits, masks).nan_to_num(7))
    assert torch.equal(logits.nan_to_num(7), before.nan_to_num(7)) and found.dtype is dtype
    with pytest.raises(ValueError, match="masks must be dense int32"):
        C_OPS.mask_logits(logits.float(), masks[:, :0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_c_does_not_read_goes_to_the_reference(dtype) -> None:
    x, weight = torch.randn(2, 8).to(dtype), torch.ones(8).to(dtype)
    assert torch.equal(C_OPS.silu_mul(x), TORCH_OPS.silu_mul(x))
    assert torch.equal(C_OPS.add_rms_norm(x, x, weight, 1e-6)[0], TORCH_OPS.add_rms_norm(x, x, weight, 1e-6)[0])
    columns = torch.randn(8, 2).mT  # the last dimension is not dense
    assert torch.equal(C_OPS.silu_mul(columns), TORCH_OPS.silu_mul(columns))


# -- bfloat16: as the reference in float32 on the same values, rounded once ------------------------------------------


def nearest(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16)


@given(st.integers(0, 40), WIDTHS, st.booleans(), st.integers(0, 99))
@settings(max_examples=40)
def test_the_norm_of_bfloat16_is_that_of_float32_rounded_once(num_tokens, width, has_residual, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    wide, weight = (nearest(torch.randn(num_tokens, 3 * width, generator=rng)), nearest(torch.rand(width) + 0.5))
    x, residual = wide[:, :width], wide[:, 2 * width :] if has_residual else None
    normed, total = C_OPS.add_rms_norm(x, residual, weight, 1e-6)
    assert normed.dtype is total.dtype is torch.bfloat16
    assert torch.equal(total, x if residual is None else x + residual)
    expected, _ = TORCH_OPS.add_rms_norm(total.float(), None, weight.float(), 1e-6)
    torch.testing.assert_close(normed.float(), expected, **ONE_ROUNDING)


@given(st.integers(0, 40), WIDTHS, st.sampled_from([1e-3, 1.0, 50.0]), st.integers(0, 99))
@settings(max_examples=40)
def test_silu_mul_of_bfloat16_is_that_of_float32_rounded_once(num_tokens, width, scale, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    gate_up = nearest(torch.randn(num_tokens, 4 * width, generator=rng) * scale)[:, width : 3 * width]
    expected = TORCH_OPS.silu_mul(gate_up.float())
    torch.testing.assert_close(C_OPS.silu_mul(gate_up).float(), expected, **ONE_ROUNDING)


@given(st.integers(0, 40), st.sampled_from([2, 8, 24, 80]), st.booleans(), st.integers(0, 99))
@settings(max_examples=40)
def test_rotated_heads_of_bfloat16_are_those_of_float32_rounded_once(num_tokens, dim, has_norm, seed) -> None:
    rng = torch.Generator().manual_seed(seed)
    qkv = nearest(torch.randn(num_tokens, 9, dim, generator=rng))[:, :8]
    cos, sin = nearest(torch.randn(2, num_tokens, 1, dim, generator=rng))
    weight = nearest(torch.rand(6, dim, generator=rng)) if has_norm else None
    named = {"num_heads": 4, "num_kv_heads": 2, "eps": 1e-5}
    ours = C_OPS.qk_norm_rope(qkv, cos, sin, norm_weight=weight, **named)
    wide = None if weight is None else weight.float()
    expected = TORCH_OPS.qk_norm_rope(qkv.float(), cos.float(), sin.float(), norm_weight=wide, **named)
    torch.testing.assert_close(ours.float(), expected, atol=1e-5, rtol=2**-8)


def test_bfloat16_rounds_ties_to_even_and_keeps_nan_and_infinity() -> None:
    """1 + k / 256 lies between two bfloat16 neighbours of 1 for odd k: every one is a tie."""
    x, y = torch.ones(1, 64, dtype=torch.bfloat16), torch.arange(64).view(1, 64) / 256
    total = C_OPS.add_rms_norm(x, nearest(y), torch.ones(64, dtype=torch.bfloat16), 1e-6)[1]
    assert torch.equal(total, nearest(1 + y))
    y[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    total = C_OPS.add_rms_norm(x, nearest(y), torch.ones(64, dtype=torch.bfloat16), 1e-6)[1]
    assert total[0, 0].isnan() and total[0, 1:3].tolist() == [math.inf, -math.inf]


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_a_mixture_of_dtypes_goes_to_the_reference() -> None:
    x, weight = torch.randn(2, 8), torch.ones(8, dtype=torch.bfloat16)
    ours, theirs = (ops.add_rms_norm(x, None, weight, 1e-6)[0] for ops in (C_OPS, TORCH_OPS))
    assert ours.dtype is theirs.dtype and torch.equal(ours, theirs)
