"""The steps to FlashAttention: each gives softmax attention, and moves exactly what its formula says."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paged_infer.kernels.attention.online_softmax import (
    InHBM,
    Traffic,
    absorb,
    naive_attention,
    online_attention,
    online_softmax,
    safe_softmax_attention,
    tile_sizes,
    tiled_attention,
)

STEPS = {
    "naive": naive_attention,
    "safe": safe_softmax_attention,
    "online": online_attention,
    "online, keys by threes": lambda q, k, v, **options: online_attention(q, k, v, block_k=3, **options),
    "tiled": lambda q, k, v, **options: tiled_attention(q, k, v, block_q=3, block_k=2, **options),
}
SAFE_STEPS = [name for name in STEPS if name != "naive"]


def one_head(num_queries: int, num_keys: int, head_dim: int = 5, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_queries * 100 + num_keys)
    q, k, v = (
        torch.randn(n, head_dim, generator=generator, dtype=torch.float64) for n in (num_queries, num_keys, num_keys)
    )
    return q * scale, k, v


def expected(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Row by row, in float64, by torch's softmax; a row that sees nothing is 0."""
    out = torch.zeros_like(q, dtype=torch.float64)
    for i in range(len(q)):
        seen = max(0, i + 1 + len(k) - len(q)) if causal else len(k)
        if seen:
            scores = k[:seen].double() @ q[i].double() / math.sqrt(q.shape[1])
            out[i] = scores.softmax(0) @ v[:seen].double()
    return out


# -- The same numbers


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(STEPS)),
    num_keys=st.integers(1, 12),
    data=st.data(),
    head_dim=st.integers(1, 7),
    causal=st.booleans(),
)
def test_every_step_is_softmax_attention(name, num_keys, data, head_dim, causal):
    q, k, v = one_head(data.draw(st.integers(1, num_keys)), num_keys, head_dim)
    out, _ = STEPS[name](q, k, v, causal=causal)
    torch.testing.assert_close(out, expected(q, k, v, causal), rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(
    num_keys=st.integers(1, 12),
    data=st.data(),
    block_q=st.integers(1, 14),
    block_k=st.integers(1, 14),
    causal=st.booleans(),
)
def test_tiles_of_any_size_give_the_same(num_keys, data, block_q, block_k, causal):
    q, k, v = one_head(data.draw(st.integers(1, num_keys)), num_keys)
    out, _ = tiled_attention(q, k, v, block_q=block_q, block_k=block_k, causal=causal)
    torch.testing.assert_close(out, expected(q, k, v, causal), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", STEPS)
def test_float32_stays_float32_and_close(name):
    q, k, v = one_head(9, 11)
    out, _ = STEPS[name](q.float(), k.float(), v.float(), causal=True)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected(q, k, v, causal=True), rtol=0, atol=1e-6)


# -- Where exponentials overflow, and where nothing is seen


def test_naive_exponentials_overflow_where_safe_ones_do_not():
    q, k, v = (x.float() for x in one_head(6, 6, scale=200.0))
    assert (q @ k.T / math.sqrt(5)).max() > 88.8  # exp of it is inf in float32
    assert naive_attention(q, k, v)[0].isnan().any()
    for name in SAFE_STEPS:
        out, _ = STEPS[name](q, k, v)
        torch.testing.assert_close(out.double(), expected(q, k, v), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SAFE_STEPS)
def test_a_query_that_sees_no_key_gets_zeros(name):
    q, k, v = one_head(7, 4)  # causal and aligned to the end: the first three come before every key
    out, _ = STEPS[name](q, k, v, causal=True)
    assert out[:3].eq(0).all()
    torch.testing.assert_close(out, expected(q, k, v, causal=True), rtol=1e-12, atol=1e-12)


def test_an_empty_stream_has_no_maximum_and_no_sum():
    for stream in ([], [torch.empty(0)], [torch.full((3,), -math.inf)], [torch.tensor([-math.inf])] * 2):
        assert [x.item() for x in online_softmax(stream)] == [-math.inf, 0.0]


def test_hidden_scores_before_and_after_change_nothing():
    hidden, scores = torch.full((2,), -math.inf), torch.tensor([3.0, 1.0])
    alone = online_softmax([scores])
    assert online_softmax([hidden, scores, hidden]) == alone
    assert alone[1].item() == pytest.approx(1 + math.exp(-2))


# -- The recurrence


@settings(max_examples=60)
@given(
    scores=st.lists(st.floats(-700, 700) | st.just(-math.inf), min_size=1, max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)
def test_any_split_of_a_stream_has_the_same_maximum_and_sum(scores, cuts):
    whole = torch.tensor(scores, dtype=torch.float64)
    edges = [0, *sorted(min(cut, len(scores)) for cut in cuts), len(scores)]
    peak, total = online_softmax(whole[start:stop] for start, stop in pairwise(edges))
    assert peak == whole.max()
    if whole.max() > -math.inf:
        torch.testing.assert_close(peak + total.log(), whole.logsumexp(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close((whole - peak).exp() / total, whole.softmax(0), rtol=1e-12, atol=1e-15)


def test_the_old_sum_shrinks_when_a_larger_score_arrives_and_stays_when_not():
    peak, total = torch.tensor(1.0), torch.tensor(2.0)
    assert absorb(peak, total, torch.tensor([1.0]))[1].item() == 3.0
    assert absorb(peak, total, torch.tensor([4.0]))[1].item() == pytest.approx(2 * math.exp(-3) + 1)


# -- What moves


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("N", "M", "d"), [(8, 8, 4), (5, 9, 3), (1, 7, 2)])
def test_naive_and_safe_traffic_is_the_matrices_they_write_out(N, M, d, causal):
    # q, k and v are read once and the output written once. The scores are written, and read once by a naive softmax
    # but three times by a safe one; the weights are written, and read by the last product.
    _, naive = naive_attention(*one_head(N, M, d), causal=causal)
    _, safe = safe_softmax_attention(*one_head(N, M, d), causal=causal)
    assert naive == Traffic(num_read=N * d + 2 * M * d + (1 + 1) * N * M, num_written=N * d + 2 * N * M)
    assert safe == Traffic(num_read=N * d + 2 * M * d + (3 + 1) * N * M, num_written=N * d + 2 * N * M)


@pytest.mark.parametrize("block_k", [1, 3, 20])
@pytest.mark.parametrize(("N", "M", "d"), [(8, 8, 4), (5, 9, 3), (1, 7, 2)])
def test_online_traffic_is_all_seen_keys_again_for_every_query(N, M, d, block_k):
    _, full = online_attention(*one_head(N, M, d), block_k=block_k)
    _, causal = online_attention(*one_head(N, M, d), block_k=block_k, causal=True)
    seen = N * (M - N) + N * (N + 1) // 2  # M - N earlier keys for everyone, and a triangle
    assert full == Traffic(num_read=N * d + 2 * N * M * d, num_written=N * d)
    assert causal == Traffic(num_read=N * d + 2 * seen * d, num_written=N * d)


@pytest.mark.parametrize("block_k", [1, 4, 32])
def test_tiled_traffic_is_all_seen_keys_again_for_every_block_of_queries(block_k):
    N, M, d, block_q = 12, 20, 3, 4
    _, full = tiled_attention(*one_head(N, M, d), block_q=block_q, block_k=block_k)
    _, causal = tiled_attention(*one_head(N, M, d), block_q=block_q, block_k=block_k, causal=True)
    # The last query of each of the three blocks is token 11, 15 and 19 of 20, and sees itself.
    assert full == Traffic(num_read=N * d + 2 * d * 3 * M, num_written=N * d)
    assert causal == Traffic(num_read=N * d + 2 * d * (12 + 16 + 20), num_written=N * d)


def test_a_last_block_that_is_not_full_costs_a_whole_read_of_the_keys():
    N, M, d = 13, 20, 3
    _, traffic = tiled_attention(*one_head(N, M, d), block_q=4, block_k=8)
    assert traffic == Traffic(num_read=N * d + 2 * d * math.ceil(13 / 4) * M, num_written=N * d)


def test_one_query_a_block_moves_what_online_attention_moves():
    q, k, v = one_head(6, 9)
    for causal in (False, True):
        tiled = tiled_attention(q, k, v, block_q=1, block_k=2, causal=causal)
        assert tiled[1] == online_attention(q, k, v, block_k=2, causal=causal)[1]


def test_key_traffic_halves_when_fast_memory_doubles():
    d, N = 8, 96
    key_reads = []
    for block_q in (3, 6, 12, 24, 48):
        fast_elements = block_q * (5 * d + 2)
        assert tile_sizes(fast_elements, d) == (block_q, min(block_q, d))
        _, traffic = tiled_attention(*one_head(N, N, d), block_q=block_q, block_k=min(block_q, d))
        key_reads.append(traffic.num_read - N * d)
        assert key_reads[-1] * fast_elements == 2 * N * N * d * (5 * d + 2)  # Theta(N^2 d^2 / M_fast), exactly
    assert all(before == 2 * after for before, after in pairwise(key_reads))


def test_tiles_move_less_than_the_score_matrix_once_fast_memory_is_large_enough():
    q, k, v = one_head(64, 64, 8)
    _, standard = naive_attention(q, k, v)
    moved = {}
    for fast_elements in (42, 84, 336, 2688):
        block_q, block_k = tile_sizes(fast_elements, 8)
        moved[fast_elements] = tiled_attention(q, k, v, block_q=block_q, block_k=block_k)[1].num_moved
    assert moved[42] > moved[84] > standard.num_moved > moved[336] > moved[2688]
    assert moved[2688] == 4 * 64 * 8  # all queries in one block: each input read once, the output written once


@given(fast_elements=st.integers(1, 10**6), head_dim=st.integers(1, 256))
def test_all_that_a_tile_holds_fits_fast_memory_and_its_fifths_are_full(fast_elements, head_dim):
    if fast_elements < 5 * head_dim + 2:
        with pytest.raises(ValueError, match=f"{5 * head_dim + 2} are needed"):
            tile_sizes(fast_elements, head_dim)
        return
    block_q, block_k = tile_sizes(fast_elements, head_dim)
    q_and_out, k_and_v = 2 * block_q * head_dim, 2 * block_k * head_dim
    assert q_and_out + k_and_v + block_q * block_k + 2 * block_q <= fast_elements
    assert 1 <= block_k <= block_q
    assert (block_q + 1) * (5 * head_dim + 2) > fast_elements


# -- The count cannot drift from the act


def test_loads_are_copies_that_count_and_stores_count_what_they_overwrite():
    traffic = Traffic()
    matrix = InHBM(torch.arange(6.0).reshape(3, 2), traffic)
    matrix.load(1).zero_()
    matrix.load(slice(0, 2)).zero_()
    assert matrix.load().tolist() == [[0, 1], [2, 3], [4, 5]]
    assert traffic == Traffic(num_read=2 + 4 + 6)
    matrix.store(torch.tensor([7.0, 8.0]), 1)
    assert matrix.load(1).tolist() == [7, 8]
    assert (traffic.num_read, traffic.num_written, traffic.num_moved) == (14, 2, 16)
    assert matrix.reserve(9, 9).shape == (9, 9)
    assert traffic.num_moved == 16


def test_a_store_does_not_broadcast():
    traffic = Traffic()
    with pytest.raises(ValueError, match=r"\[2\] does not fill \[3, 2\]"):
        InHBM(torch.zeros(3, 2), traffic).store(torch.ones(2))
    assert traffic.num_written == 0


@pytest.mark.parametrize("algorithm", [naive_attention, safe_softmax_attention, online_attention, tiled_attention])
def test_an_algorithm_is_handed_no_tensor(algorithm):
    handed = list(inspect.signature(algorithm).parameters.values())[:3]
    assert [(p.name, p.annotation) for p in handed] == [(name, "InHBM") for name in "QKV"]
    assert "_matrix" not in inspect.getsource(algorithm)


@pytest.mark.parametrize("algorithm", [naive_attention, online_attention])
@pytest.mark.parametrize(
    "shapes", [((3, 4), (5, 3), (5, 3)), ((3, 4), (5, 4), (4, 4)), ((3, 4), (0, 4), (0, 4)), ((4,), (5, 4), (5, 4))]
)
def test_shapes_that_do_not_fit_are_refused_by_name(algorithm, shapes):
    with pytest.raises(ValueError, match=r"one head has q \[N, d\]"):
        algorithm(*(torch.zeros(shape) for shape in shapes))


def test_an_empty_block_is_refused():
    with pytest.raises(ValueError, match="a block of 0 rows"):
        tiled_attention(*one_head(2, 2), block_q=0, block_k=1)
