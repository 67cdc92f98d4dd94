"""Paged attention: both torch versions equal a float64 loop that looks up one key at a time, and read nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paged_infer.cache.spec import StepMeta
from paged_infer.kernels.registry import ATTENTION_BACKENDS, attention_backend

CPU = torch.device("cpu")


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
        self.keys[-1], self.values[-1] = 0.0, 0.0  # the block that belongs to nobody
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

    def step(self) -> StepMeta:
        unused = torch.empty(0, dtype=torch.int64)
        return StepMeta(
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
@settings(max_examples=60)
def test_every_torch_backend_equals_the_definition_and_reads_no_stray_slot(batch: Batch) -> None:
    expected = batch.expected()
    for name, backend in ATTENTION_BACKENDS.items():
        if name not in ("torch", "sdpa"):
            continue
        out = backend(batch.q, batch.keys, batch.values, batch.step(), window=batch.window)
        assert out.shape == batch.q.shape and out.dtype == batch.q.dtype
        torch.testing.assert_close(
            out.double(), expected, atol=2e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ["torch", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_definition(name: str, dtype: torch.dtype) -> None:
    batch = Batch([(30, 1), (0, 7), (5, 4)], 3, 6, 2, 24, None, seed=3)
    batch.q, batch.keys, batch.values = (x.to(dtype) for x in (batch.q, batch.keys, batch.values))
    out = ATTENTION_BACKENDS[name](batch.q, batch.keys, batch.values, batch.step(), window=None)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), batch.expected(), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("name", ["torch", "sdpa"])
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


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"attention_backend='flash9' is not known; known: auto, torch, sdpa"
    ):
        attention_backend("flash9", CPU)


def test_auto_is_a_backend_that_runs_here() -> None:
    assert attention_backend("auto", CPU) in ATTENTION_BACKENDS.values()
