"""The experts of a mixture: a loop, sorted segments in torch and C, and a grouped Triton product compute the same."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from captured import Recorder
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_infer.kernels.cpu.build import unavailable_reason
from paged_infer.kernels.cpu.experts import PanelExperts, pack_experts_c
from paged_infer.kernels.fused.grouped_gemm import grouped_experts, plan_experts
from paged_infer.kernels.fused.moe import ExpertsProduct, ExpertWeights, blocked_linear, loop_experts, sort_experts
from paged_infer.kernels.fused.silu_mul import silu_mul_reference
from paged_infer.kernels.op_sets import C_OPS, SDPA_OPS, TORCH_OPS, TRITON_OPS


def packed_in_c(weights: ExpertWeights) -> ExpertsProduct:
    """From a copy, since packing takes the memory of the weights."""
    return pack_experts_c(replace(weights, up=weights.up.clone(), down=weights.down.clone()))


COMPUTATIONS = {"loop": loop_experts, "sorted": sort_experts, "c": packed_in_c, "triton": grouped_experts}
# What silu makes of rows that route nowhere, which are unset, is not read.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def some_experts(
    num_experts: int,
    hidden: int,
    width: int,
    *,
    has_bias: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> ExpertWeights:
    rng = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=rng).to(dtype)  # noqa: E731
    up, down = random(num_experts, 2 * width, hidden) / hidden**0.5, random(num_experts, hidden, width) / width**0.5
    biases = (random(num_experts, 2 * width), random(num_experts, hidden)) if has_bias else (None, None)
    return ExpertWeights(up, down, silu_mul_reference, *biases)


def routed(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and scores [T, k]. The last expert is chosen by no token."""
    rng = torch.Generator().manual_seed(seed)
    preference = torch.rand(num_tokens, num_experts, generator=rng)
    preference[:, num_experts - 1 :] = -1
    ids = preference.topk(top_k).indices
    return ids, torch.rand(num_tokens, top_k, generator=rng)


def in_float64(weights: ExpertWeights, x, ids, scores) -> torch.Tensor:
    """One pair at a time, by the definition."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(ids.tolist()):
        for rank, expert in enumerate(row):
            if expert >= 0:
                gate, up = (weights.up[expert].double() @ x[token].double()).chunk(2)
                if weights.up_bias is not None:
                    bias = weights.up_bias[expert].double().chunk(2)
                    gate, up = gate + bias[0], up + bias[1]
                value = weights.down[expert].double() @ (gate * torch.sigmoid(gate) * up)
                value = value if weights.down_bias is None else value + weights.down_bias[expert].double()
                out[token] += scores[token, rank].double() * value
    return out


@pytest.mark.parametrize("name", COMPUTATIONS)
@given(
    num_tokens=st.sampled_from([0, 1, 2, 15, 16, 17, 40]),
    sizes=st.sampled_from([(5, 2, 96, 24), (3, 1, 33, 7), (9, 4, 64, 80), (40, 8, 20, 12), (2, 1, 1024, 3)]),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_each_computation_equals_the_definition_and_padding_routes_nowhere(
    name, num_tokens, sizes, has_bias, seed
) -> None:
    num_experts, top_k, hidden, width = sizes
    weights = some_experts(num_experts, hidden, width, has_bias=has_bias, seed=seed)
    x = torch.randn(num_tokens, 2 * hidden, generator=torch.Generator().manual_seed(seed))[:, hidden:]  # rows are apart
    ids, scores = routed(num_tokens, num_experts, top_k, seed)
    ids[1::3], scores[1::3] = -1, 1.0
    out = COMPUTATIONS[name](weights)(x, ids, scores)
    assert out.shape == x.shape and not out[1::3].any()
    torch.testing.assert_close(out.double(), in_float64(weights, x, ids, scores), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_a_row_has_the_same_bits_alone_and_in_any_crowd(name) -> None:
    """Of 140 rows on 2 experts, Triton's blocks have 64 rows; of fewer, 16."""
    for num_experts, top_k, hidden, width in ((2, 1, 40, 9), (17, 4, 1024, 24))[: 1 if name == "triton" else 2]:
        product = COMPUTATIONS[name](some_experts(num_experts, hidden, width, has_bias=True))
        x, (ids, scores) = torch.randn(140, hidden), routed(140, num_experts, top_k)
        together = product(x, ids, scores)
        assert together.abs().max() > 0.1
        for rows in (slice(0, 1), slice(3, 5), slice(5, 22), slice(40, 139)):
            assert torch.equal(product(x[rows], ids[rows], scores[rows]), together[rows])
        mixed = torch.randperm(140)
        assert torch.equal(product(x[mixed], ids[mixed], scores[mixed]), together[mixed])
        loud = x.clone()
        loud[1:] *= 1e4
        assert torch.equal(product(loud, ids, scores)[0], together[0])


def test_the_sorted_segments_have_the_bits_of_the_loop() -> None:
    weights, (ids, scores) = some_experts(8, 96, 40), routed(70, 8, 3)
    x = torch.randn(70, 96)
    assert torch.equal(sort_experts(weights)(x, ids, scores), loop_experts(weights)(x, ids, scores))


def test_a_product_of_blocks_is_the_plain_product() -> None:
    weight, bias = torch.randn(30, 50), torch.randn(30)
    for num_rows in (0, 1, 15, 16, 17, 33):
        x = torch.randn(num_rows, 50)
        torch.testing.assert_close(blocked_linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("name", COMPUTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_the_definition(name, dtype) -> None:
    weights, (ids, scores) = some_experts(5, 64, 24, has_bias=True, dtype=dtype), routed(9, 5, 2)
    x = torch.randn(9, 64).to(dtype)
    out = COMPUTATIONS[name](weights)(x, ids, scores)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), in_float64(weights, x, ids, scores), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_a_nan_stays_in_its_row(name) -> None:
    product, (ids, scores) = COMPUTATIONS[name](some_experts(4, 32, 16)), routed(20, 4, 2)
    x = torch.randn(20, 32)
    clean = product(x, ids, scores)
    x[7] = math.nan
    out = product(x, ids, scores)
    assert out[7].isnan().all()
    out[7] = clean[7]
    assert torch.equal(out, clean)


# -- The plan of the grouped product ---------------------------------------------------------------------------------


@given(
    num_tokens=st.integers(0, 90),
    num_experts=st.sampled_from([1, 2, 7]),
    top_k=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 999),
)
@settings(max_examples=12, deadline=None)
def test_each_pair_is_in_one_block_of_its_expert_and_each_block_has_one_expert(
    num_tokens, num_experts, top_k, seed
) -> None:
    ids = torch.randint(-1, num_experts, (num_tokens, top_k), generator=torch.Generator().manual_seed(seed))
    plan = plan_experts(ids, num_experts)
    num_blocks = int(plan.num_blocks) if num_tokens else 0
    blocks = plan.pairs.view(-1, plan.rows)[:num_blocks]
    placed = sorted(pair for block in blocks.tolist() for pair in block if pair < ids.numel())
    assert placed == [pair for pair, expert in enumerate(ids.flatten().tolist()) if expert >= 0]
    for block, expert in zip(blocks.tolist(), plan.expert_of_block.tolist(), strict=False):
        assert {int(ids.flatten()[pair]) for pair in block if pair < ids.numel()} == {expert}


def test_a_graph_holds_the_grouped_experts_and_follows_the_ids_of_each_step() -> None:
    weights = some_experts(6, 32, 16)
    product = grouped_experts(weights)
    x, (ids, scores) = torch.randn(5, 32), routed(5, 6, 2)
    ids[3:] = -1  # padding at the capture
    out = torch.empty(5, 32)
    replay = Recorder()(lambda: out.copy_(product(x, ids, scores)))
    for seed in (1, 2):
        new_ids, new_scores = routed(5, 6, 2, seed)
        new_ids[seed] = -1
        ids.copy_(new_ids), scores.copy_(new_scores)
        replay()
        torch.testing.assert_close(out.double(), in_float64(weights, x, ids, scores), rtol=1e-5, atol=1e-5)


# -- Choice and errors -----------------------------------------------------------------------------------------------


def test_each_set_of_operations_has_its_own_computation() -> None:
    found = [ops.pack_experts for ops in (TORCH_OPS, SDPA_OPS, C_OPS, TRITON_OPS)]
    assert found == [loop_experts, sort_experts, pack_experts_c, grouped_experts]


@pytest.mark.skipif(unavailable_reason() is not None, reason=f"no C kernels: {unavailable_reason()}")
def test_c_packs_float32_and_leaves_other_dtypes_to_torch() -> None:
    assert isinstance(pack_experts_c(some_experts(3, 32, 16)), PanelExperts)
    assert not isinstance(pack_experts_c(some_experts(3, 32, 16, dtype=torch.bfloat16)), PanelExperts)


def test_stacks_and_rows_that_do_not_fit_are_refused() -> None:
    right = some_experts(3, 32, 16)
    for up, down in (
        (right.up[:, 1:], right.down),
        (right.up, right.down[:2]),
        (right.up, right.down.mT),
        (right.up.half(), right.down),
    ):
        with pytest.raises(ValueError, match="experts"):
            grouped_experts(ExpertWeights(up, down, silu_mul_reference))
    for x in (torch.ones(4, 31), torch.ones(3, 32), torch.ones(4, 32).half(), torch.ones(32, 4).mT):
        with pytest.raises(ValueError, match=r"x must be \[4, 32\]"):
            grouped_experts(right)(x, *routed(4, 3, 2))
