"""Paged attention: every version equals a float64 loop that looks up one key at a time, and reads nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.attention.paged_attention import paged_attention, paged_attention_reference
from paged_infer.kernels.attention.paged_sdpa import similar_rows
from paged_infer.kernels.attention_backends import ATTENTION_BACKENDS

BACKENDS = ["torch", "sdpa", "c", "triton"]


@dataclass
class Batch:
    """Sequences of (tokens before, queries), their keys and values scattered over a pool that is NaN elsewhere."""

    sequences: list[tuple[int, int]]
    block_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    seed: int

    def __post_init__(self) -> None:
        self.sequences.sort(key=lambda s: s[1] > 1)
        rng = torch.Generator().manual_seed(self.seed)
        lengths = [before + queries for before, queries in self.sequences]
        needed = [-(-length // self.block_size) for length in lengths]
        num_blocks = sum(needed) + 2
        shape = (num_blocks + 1, self.block_size, self.num_kv_heads, self.head_dim)
        self.keys, self.values = (torch.full(shape, math.nan) for _ in "kv")
        self.keys[-1], self.values[-1] = 0.0, 0.0  # the block that is never assigned
        order = torch.randperm(num_blocks, generator=rng)
        junk = order[-1]  # surplus entries of a table point at NaN
        self.tables = torch.full((len(lengths), max(needed) + 1), int(junk), dtype=torch.int32)
        taken = 0
        for row, length in enumerate(lengths):
            self.tables[row, : needed[row]] = order[taken : taken + needed[row]].to(torch.int32)
            taken += needed[row]
            for token in range(length):
                at = self.place(row, token)
                self.keys[at], self.values[at] = torch.randn(2, *shape[2:], generator=rng)
        counts = torch.tensor([queries for _, queries in self.sequences])
        self.query_start_loc = torch.cat((torch.zeros(1), counts.cumsum(0))).to(torch.int32)
        self.q = torch.randn(int(counts.sum()), self.num_heads, self.head_dim, generator=rng)
        self.lengths = lengths

    def place(self, row: int, token: int) -> tuple[int, int]:
        return int(self.tables[row, token // self.block_size]), token % self.block_size

    def step(self) -> AttentionMetadata:
        unused = torch.empty(0, dtype=torch.int64)
        return AttentionMetadata(
            positions=unused,
            slot_mapping=unused,
            query_start_loc=self.query_start_loc,
            seq_lens=torch.tensor(self.lengths, dtype=torch.int32),
            block_tables=self.tables,
            num_decodes=sum(queries == 1 for _, queries in self.sequences),
            max_query_len=max(queries for _, queries in self.sequences),
            max_seq_len=max(self.lengths),
        )

    def expected(self) -> Tensor:
        """Softmax over keys fetched one by one, in float64: the definition, with nothing shared with the kernels."""
        rows = []
        for row, (before, queries) in enumerate(self.sequences):
            for position in range(before, before + queries):
                first = 0 if self.window is None else max(0, position - self.window + 1)
                places = [self.place(row, token) for token in range(first, position + 1)]
                query = self.q[len(rows)].double()
                heads = []
                for head in range(self.num_heads):
                    kv_head = head * self.num_kv_heads // self.num_heads
                    keys = torch.stack([self.keys[at][kv_head] for at in places]).double()
                    values = torch.stack([self.values[at][kv_head] for at in places]).double()
                    weights = (keys @ query[head] / math.sqrt(self.head_dim)).exp()
                    heads.append((weights / weights.sum()) @ values)
                rows.append(torch.stack(heads))
        return torch.stack(rows)


DECODE = st.tuples(st.integers(0, 40), st.just(1))
PROMPT = st.tuples(st.just(0), st.integers(1, 24))
CHUNK = st.tuples(st.integers(0, 30), st.integers(1, 12))
BATCHES = st.builds(
    Batch,
    sequences=st.lists(DECODE | PROMPT | CHUNK, min_size=1, max_size=4),
    block_size=st.sampled_from([1, 3, 16]),
    num_kv_heads=st.just(2),
    num_heads=st.sampled_from([2, 4, 6]),
    head_dim=st.sampled_from([8, 24, 80]),
    window=st.none() | st.integers(1, 20),
    seed=st.integers(0, 99),
)


@given(BATCHES)
@settings(max_examples=30)
def test_every_backend_equals_the_definition_and_reads_no_stray_slot(batch: Batch) -> None:
    expected = batch.expected()
    for name in BACKENDS:
        out = ATTENTION_BACKENDS[name](batch.q, batch.keys, batch.values, batch.step(), window=batch.window)
        assert out.shape == batch.q.shape and out.dtype == batch.q.dtype
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_stays_near_the_definition(name: str, dtype: torch.dtype, tolerance: float) -> None:
    batch = Batch([(30, 1), (0, 7), (5, 4)], 3, 6, 2, 24, None, seed=3)
    batch.q, batch.keys, batch.values = (x.to(dtype) for x in (batch.q, batch.keys, batch.values))
    out = ATTENTION_BACKENDS[name](batch.q, batch.keys, batch.values, batch.step(), window=None)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), batch.expected(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_window_of_one_sees_only_the_token_itself(name: str) -> None:
    batch = Batch([(9, 1), (4, 3)], 3, 4, 2, 8, window=1, seed=0)
    out = ATTENTION_BACKENDS[name](batch.q, batch.keys, batch.values, batch.step(), window=1)
    own = [batch.values[batch.place(0, 9)], *(batch.values[batch.place(1, t)] for t in (4, 5, 6))]
    torch.testing.assert_close(out, torch.stack(own).repeat_interleave(2, 1))


def test_layers_with_and_without_a_window_do_not_share_a_plan() -> None:
    batch = Batch([(30, 1), (0, 20), (9, 5)], 3, 4, 2, 8, window=None, seed=1)
    step = batch.step()
    for window in (None, 4, 11, None, 4):
        batch.window = window
        out = ATTENTION_BACKENDS["sdpa"](batch.q, batch.keys, batch.values, step, window=window)
        torch.testing.assert_close(out.double(), batch.expected(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ([], []),
        ([7], [1]),
        ([100, 90, 4, 3], [2, 2]),
        ([1000, 100, 90, 4, 3], [1, 2, 2]),
        ([60, 59, 58], [3]),
        ([100, 60], [2]),  # a cut would save 40
    ],
)
def test_rows_longest_first_are_cut_where_that_saves_padding(lengths: list[int], runs: list[int]) -> None:
    slices = similar_rows(lengths, worth_a_split=50)
    assert [run.stop - run.start for run in slices] == runs
    assert [length for run in slices for length in lengths[run]] == lengths


# -- the public function ----------------------------------------------------------------------------------------------


def indices(batch: Batch) -> dict[str, Tensor]:
    step = batch.step()
    return {"block_tables": step.block_tables, "seq_lens": step.seq_lens, "query_start_loc": step.query_start_loc}


def test_without_hints_it_finds_out_itself_and_with_hints_it_says_the_same() -> None:
    batch = Batch([(130, 1), (3, 1), (0, 1), (5, 20), (40, 37)], 16, 4, 2, 8, None, seed=3)
    given = (batch.q, batch.keys, batch.values)
    out, lse = paged_attention(*given, **indices(batch), return_lse=True)
    reference, reference_lse = paged_attention_reference(*given, **indices(batch), return_lse=True)
    torch.testing.assert_close(out, reference, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, reference_lse, atol=1e-5, rtol=1e-5)
    hints = {"num_decodes": 3, "max_query_len": 64, "max_seq_len": 4096}  # looser than needed, as in a CUDA graph
    assert torch.equal(paged_attention(*given, **indices(batch), **hints), out)
    fewer = {"num_decodes": 1, "max_query_len": 37, "max_seq_len": 131}  # single queries among the chunks
    torch.testing.assert_close(paged_attention(*given, **indices(batch), **fewer), out, atol=1e-6, rtol=1e-6)


def test_single_queries_behind_a_chunk_are_served_too() -> None:
    batch = Batch([(4, 1), (9, 6)], 3, 2, 1, 8, None, seed=3)
    batch.sequences.reverse()
    batch.tables, batch.lengths = batch.tables.flip(0), batch.lengths[::-1]
    batch.query_start_loc = torch.tensor([0, 6, 7], dtype=torch.int32)
    index = indices(batch)
    index["seq_lens"] = torch.tensor(batch.lengths, dtype=torch.int32)
    out = paged_attention(batch.q, batch.keys, batch.values, **index)
    torch.testing.assert_close(out.double(), batch.expected(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("contexts", [(10, 99, 6), (3,), (130, 0)])
def test_rows_that_only_fill_up_a_batch_change_nothing_and_get_zeros(contexts: tuple[int, ...]) -> None:
    batch = Batch([(before, 1) for before in contexts], 16, 4, 2, 8, None, seed=5)
    real = len(contexts)
    out = torch.full((real + 3, 4, 8), math.nan)
    # Two rows of length 0 with a query, and one without any; their table entries may point anywhere.
    junk = torch.full((3, batch.tables.shape[1]), 2**30, dtype=torch.int32)
    starts = torch.tensor([*range(real + 3), real + 2], dtype=torch.int32)
    _, lse = paged_attention(
        torch.cat((batch.q, torch.full((3, 4, 8), math.nan))),
        batch.keys,
        batch.values,
        block_tables=torch.cat((batch.tables, junk)),
        seq_lens=torch.tensor([*batch.lengths, 0, 0, 0], dtype=torch.int32),
        query_start_loc=starts,
        num_decodes=real + 3,
        max_query_len=1,
        out=out,
        return_lse=True,
    )
    torch.testing.assert_close(out[:real].double(), batch.expected(), atol=1e-5, rtol=1e-5)
    assert not out[real : real + 2].any() and (lse[real : real + 2] == -math.inf).all()
    assert out[real + 2].isnan().all()  # a query of no sequence: not written


@pytest.mark.parametrize("context", [40, 130])  # in one split, and in three
def test_nan_that_is_read_comes_out_as_nan(context: int) -> None:
    batch = Batch([(context, 1), (context, 20)], 16, 4, 2, 8, None, seed=5)
    for row in (0, 1):
        batch.keys[batch.place(row, 33)] = math.nan
    for attend in (paged_attention, paged_attention_reference):
        out, lse = attend(batch.q, batch.keys, batch.values, **indices(batch), return_lse=True)
        assert out.isnan().all() and lse.isnan().all()


def test_a_group_of_more_heads_than_a_program_takes_is_shared_out() -> None:
    batch = Batch([(40, 1), (3, 1)], 16, 71, 1, 8, None, seed=5)
    out = paged_attention(batch.q, batch.keys, batch.values, **indices(batch))
    torch.testing.assert_close(out.double(), batch.expected(), atol=1e-5, rtol=1e-5)


def test_a_window_beyond_32_bits_hides_nothing() -> None:
    batch = Batch([(40, 1), (3, 5)], 16, 2, 1, 8, None, seed=5)
    out = paged_attention(batch.q, batch.keys, batch.values, **indices(batch), window=2**40)
    torch.testing.assert_close(out.double(), batch.expected(), atol=1e-5, rtol=1e-5)


def test_a_wrong_hint_spoils_no_other_row() -> None:
    batch = Batch([(40, 1), (3, 5), (9, 4)], 16, 2, 1, 8, None, seed=5)
    out = paged_attention(batch.q, batch.keys, batch.values, **indices(batch), num_decodes=2, max_query_len=5)
    torch.testing.assert_close(
        out[[0, *range(6, 10)]].double(), batch.expected()[[0, *range(6, 10)]], atol=1e-5, rtol=1e-5
    )


def test_queries_may_be_views_into_a_wider_matrix() -> None:
    batch = Batch([(30, 1), (5, 9)], 16, 4, 2, 8, None, seed=5)
    wide = torch.full((10, 6, 8), math.nan)
    wide[:, :4] = batch.q
    out = paged_attention(wide[:, :4], batch.keys, batch.values, **indices(batch))
    torch.testing.assert_close(out.double(), batch.expected(), atol=1e-5, rtol=1e-5)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(3, 5, 8)}, r"5 query heads cannot share 2 key heads evenly; got q \[3, 5, 8\]"),
        ({"q": torch.zeros(3, 4, 9)}, r"share head_dim; got q \[3, 4, 9\], k_cache \[5, 16, 2, 8\]"),
        ({"q": torch.zeros(3, 4, 8).half()}, r"q torch.float16 on cpu, k_cache torch.float32 on cpu"),
        ({"v_cache": torch.zeros(5, 8, 2, 8)}, r"v_cache \[5, 8, 2, 8\]"),
        ({"k_cache": torch.zeros(5, 16, 8, 2).transpose(2, 3)}, r"caches must be contiguous; got strides"),
        ({"seq_lens": int32(20)}, r"seq_lens \[1\], query_start_loc \[3\]"),
        ({"seq_lens": torch.tensor([20, 2])}, r"seq_lens must be int32 on cpu; got torch.int64"),
        ({"block_tables": torch.tensor([[0, 5], [1, 9]]).int()}, r"block table 0 is \[0, 5\].* the 5 blocks"),
        ({"block_tables": torch.tensor([[0, 1], [-1, 9]]).int()}, r"block table 1 is \[-1\]"),
        ({"seq_lens": int32(33, 2)}, r"seq_lens \[33, 2\] must be within 0..32: tables hold 2 blocks of 16"),
        ({"query_start_loc": int32(0, 2, 4)}, r"rise from 0 to the 3 queries of q; got \[0, 2, 4\]"),
        ({"out": torch.zeros(3, 4, 4)}, r"out must be like q; got q \[3, 4, 8\], out \[3, 4, 4\]"),
        ({"out": torch.zeros(3, 4, 16)[..., ::2]}, r"out must have dense rows; got strides \(64, 16, 2\)"),
        ({"block_tables": int32(0, 2, 1, 9).view(2, 2).T}, r"block_tables must have dense rows; got strides"),
        ({"seq_lens": int32(20, 0, 2, 0)[::2]}, r"seq_lens must have dense rows; got strides \(2,\)"),
        ({"num_decodes": 3, "max_query_len": 2}, r"num_decodes=3 must be within 0..2 rows"),
        ({"num_decodes": -1, "max_query_len": 2}, r"num_decodes=-1 must be within 0..2 rows"),
        ({"k_cache": torch.zeros(5, 0, 2, 8), "v_cache": torch.zeros(5, 0, 2, 8)}, r"k_cache \[5, 0, 2, 8\]"),
        ({"window": 0}, r"window=0: must be an integer >= 1"),
        ({"window": 2.5}, r"window=2.5: must be an integer >= 1"),
        ({"scale": -1.0}, r"scale=-1.0: must be > 0"),
        ({"scale": math.inf}, r"scale=inf: must be > 0 and <= 1e\+30"),
    ],
)
def test_what_does_not_fit_is_refused_before_launch(changes, message) -> None:
    given = {
        "q": torch.zeros(3, 4, 8),
        "k_cache": torch.zeros(5, 16, 2, 8),
        "v_cache": torch.zeros(5, 16, 2, 8),
        "block_tables": torch.tensor([[0, 1], [2, 9]], dtype=torch.int32),  # 9: surplus, so it may be anything
        "seq_lens": int32(20, 2),
        "query_start_loc": int32(0, 1, 3),
    }
    paged_attention(**given)
    with pytest.raises(ValueError, match=message):
        paged_attention(**{**given, **changes})
