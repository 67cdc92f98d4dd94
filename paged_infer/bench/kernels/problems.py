"""Inputs on which attention kernels are checked and timed: keys in blocks, shuffled over a pool of NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedProblem:
    """Arguments of ``paged_attention``, and the same keys and values densely, for kernels without block tables."""

    q: Tensor  # [T, H, D]
    k_cache: Tensor  # [num_blocks, block_size, H_kv, D]; NaN in every slot without a token
    v_cache: Tensor
    block_tables: Tensor  # [B, max_blocks] int32
    seq_lens: Tensor  # [B] int32
    query_start_loc: Tensor  # [B + 1] int32
    sequences: tuple[tuple[int, int], ...]  # (tokens before, queries)

    @property
    def hints(self) -> dict[str, int]:
        """What a runner computes on the host, so that nothing is read back from the device."""
        query_lens = [queries for _, queries in self.sequences]
        return {
            "num_decodes": sum(queries == 1 for queries in query_lens),
            "max_query_len": max(query_lens),
            "max_seq_len": max(before + queries for before, queries in self.sequences),
        }

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``paged_attention`` takes, by name."""
        names = ("q", "k_cache", "v_cache", "block_tables", "seq_lens", "query_start_loc")
        return {name: getattr(self, name) for name in names} | self.hints

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that the sequences hold: each is read once at least."""
        tokens = sum(before + queries for before, queries in self.sequences)
        return 2 * tokens * math.prod(self.k_cache.shape[2:]) * self.k_cache.element_size()

    def keys_and_values(self, row: int) -> tuple[Tensor, Tensor]:
        """[length, H_kv, D] of one sequence, fetched through its table."""
        block_size, length = self.k_cache.shape[1], sum(self.sequences[row])
        token = torch.arange(length, device=self.q.device)
        slots = self.block_tables[row, token // block_size].long() * block_size + token % block_size
        return self.k_cache.flatten(0, 1)[slots], self.v_cache.flatten(0, 1)[slots]

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor]:
        """Keys and values [sum of lengths, H_kv, D], one sequence after the other."""
        rows = [self.keys_and_values(row) for row in range(len(self.sequences))]
        return torch.cat([k for k, _ in rows]), torch.cat([v for _, v in rows])

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, N, D], k and v [B, H_kv, M, D]: for sequences that are all alike."""
        if len(set(self.sequences)) != 1:
            raise ValueError("sequences of different lengths have no dense layout")
        shape = (len(self.sequences), -1)
        q, k, v = (x.unflatten(0, shape).transpose(1, 2).contiguous() for x in (self.q, *self.packed))
        return q, k, v


def paged_problem(
    sequences: Sequence[tuple[int, int]],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    poison: bool = True,
) -> PagedProblem:
    """Random queries, keys and values for rows of (tokens before, queries), decodes first.

    Args:
        poison: put NaN in every slot that holds no token. Benches leave it out.
    """
    ordered = sorted(sequences, key=lambda sequence: sequence[1] > 1)
    lengths = [before + queries for before, queries in ordered]
    needed = [-(-length // block_size) for length in lengths]
    num_blocks = sum(needed) + poison  # with one free block, to which surplus table entries point
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    tables = torch.full((len(ordered), max(needed) + poison), order[-1], dtype=torch.int32)
    ends = list(accumulate(needed))
    for row, (end, count) in enumerate(zip(ends, needed, strict=True)):
        tables[row, :count] = torch.tensor(order[end - count : end], dtype=torch.int32)
    k_cache, v_cache = (random(num_blocks, block_size, num_kv_heads, head_dim) for _ in "kv")
    if poison:
        is_stray = torch.ones(num_blocks * block_size, dtype=torch.bool)
        for row, length in enumerate(lengths):
            token = torch.arange(length)
            is_stray[tables[row, token // block_size].long() * block_size + token % block_size] = False
        for cache in (k_cache, v_cache):
            cache.flatten(0, 1)[is_stray.to(device)] = math.nan
    starts = [0, *accumulate(queries for _, queries in ordered)]
    return PagedProblem(
        q=random(starts[-1], num_heads, head_dim),
        k_cache=k_cache,
        v_cache=v_cache,
        block_tables=tables.to(device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
        sequences=tuple(ordered),
    )


def attention_float64(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None) -> Tensor:
    """The definition, head by head in float64: q [N, H, D], k and v [M, H_kv, D] -> [N, H, D] float64."""
    num_queries, num_heads, dim = q.shape
    query = torch.arange(k.shape[0] - num_queries, k.shape[0], device=q.device)[:, None]
    key = torch.arange(k.shape[0], device=q.device)
    hidden = (key > query) if causal else torch.zeros_like(key > query)
    if window is not None:
        hidden |= key <= query - window
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for head in range(num_heads):
        kv_head = head * k.shape[1] // num_heads
        scores = q[:, head].double() @ k[:, kv_head].double().T / math.sqrt(dim)
        out[:, head] = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, kv_head].double()
    return out


def paged_attention_float64(problem: PagedProblem, window: int | None = None) -> Tensor:
    """``attention_float64`` of every row of ``problem``: [T, H, D] float64."""
    rows, start = [], 0
    for row, (_, queries) in enumerate(problem.sequences):
        q = problem.q[start : start + queries]
        rows.append(attention_float64(q, *problem.keys_and_values(row), window=window))
        start += queries
    return torch.cat(rows)
