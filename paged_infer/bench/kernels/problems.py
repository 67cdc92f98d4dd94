"""Inputs on which kernels are checked, timed and compiled: random tensors, and keys in blocks shuffled over a pool."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from paged_infer.kernels.kv_quant import KV_DTYPES, dequantise_kv, quantise_kv


class Tensors:
    """Random tensors of one dtype. On the meta device they have shapes and no numbers, which is enough to compile."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self._rng = None if self.device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device, generator=self._rng)


@dataclass(frozen=True)
class PagedProblem:
    """Arguments of ``paged_attention``, and the same keys and values densely, for kernels without block tables."""

    q: Tensor  # [T, H, D]
    k_cache: Tensor  # [num_blocks, block_size, H_kv, D]
    v_cache: Tensor
    block_tables: Tensor  # [B, max_blocks] int32
    seq_lens: Tensor  # [B] int32
    query_start_loc: Tensor  # [B + 1] int32
    sequences: tuple[tuple[int, int], ...]  # (tokens before, queries)
    slots: Tensor  # [sum of lengths] int64: where the tokens of each sequence are in the caches, one after another
    k_scale: Tensor | None = None  # [num_blocks, block_size, H_kv], of caches of codes (``coded``)
    v_scale: Tensor | None = None

    @property
    def hints(self) -> dict[str, int]:
        """What a runner computes on the host, so that nothing is read back from the device."""
        query_lens = [queries for _, queries in self.sequences]
        return {
            "num_decodes": sum(queries == 1 for queries in query_lens),
            "max_query_len": max(query_lens),
            "max_seq_len": max(map(sum, self.sequences)),
        }

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``paged_attention`` takes, by name."""
        names = ("q", "k_cache", "v_cache", "block_tables", "seq_lens", "query_start_loc")
        scales = {} if self.k_scale is None else {"k_scale": self.k_scale, "v_scale": self.v_scale}
        return {name: getattr(self, name) for name in names} | scales | self.hints

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor]:
        """Keys and values [sum of lengths, H_kv, D], one sequence after another; of codes, the numbers in q's dtype."""
        k, v = (cache.flatten(0, 1).index_select(0, self.slots) for cache in (self.k_cache, self.v_cache))
        if self.k_scale is None or self.v_scale is None:
            return k, v
        scales = (scale.flatten(0, 1)[self.slots] for scale in (self.k_scale, self.v_scale))
        k, v = (dequantise_kv(codes, scale, self.q.dtype) for codes, scale in zip((k, v), scales, strict=True))
        return k, v

    def coded(self, kind: str) -> PagedProblem:
        """The same with keys and values of 8 bits, of a type in ``KV_DTYPES``."""
        (k_cache, k_scale), (v_cache, v_scale) = (
            quantise_kv(cache, KV_DTYPES[kind]) for cache in (self.k_cache, self.v_cache)
        )
        return replace(self, k_cache=k_cache, v_cache=v_cache, k_scale=k_scale, v_scale=v_scale)

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, N, D], k and v [B, H_kv, M, D]: for sequences that are all alike."""
        if len(set(self.sequences)) != 1:
            raise ValueError("sequences of different lengths have no dense layout")
        shape = (len(self.sequences), -1)
        q, k, v = (x.unflatten(0, shape).transpose(1, 2).contiguous() for x in (self.q, *self.packed))
        return q, k, v


def paged_problem(
    sequences: ReadOnlyList[tuple[int, int]],
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
        poison: put NaN in every slot that holds no token, and in a block to which surplus table entries point.
            Benches leave it out: most peers multiply by what they mask.
    """
    ordered = sorted(sequences, key=lambda sequence: sequence[1] > 1)
    lengths = [sum(sequence) for sequence in ordered]
    needed = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(needed) + poison, generator=torch.Generator().manual_seed(seed)).int()
    tables = torch.full((len(ordered), max(needed) + poison), int(order[-1]), dtype=torch.int32)
    slots = []
    for row, blocks in enumerate(order[: sum(needed)].split(needed)):
        tables[row, : len(blocks)] = blocks
        slots.append((blocks.long()[:, None] * block_size + torch.arange(block_size)).flatten()[: lengths[row]])
    tensors, all_slots = Tensors(dtype, device, seed), torch.cat(slots).to(device)

    def cache() -> Tensor:
        shape = (len(order), block_size, num_kv_heads, head_dim)
        pool = torch.full(shape, math.nan if poison else 0.0, dtype=dtype, device=device)
        pool.flatten(0, 1)[all_slots] = tensors.random(len(all_slots), num_kv_heads, head_dim)
        return pool

    def index(numbers: Iterable[int]) -> Tensor:
        return torch.tensor([*numbers], dtype=torch.int32, device=device)

    starts = index(accumulate((queries for _, queries in ordered), initial=0))
    q = tensors.random(sum(queries for _, queries in ordered), num_heads, head_dim)
    return PagedProblem(q, cache(), cache(), tables.to(device), index(lengths), starts, tuple(ordered), all_slots)


def attention_float64(
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool = True, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
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
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        sink = torch.full_like(scores[:, :1], -math.inf if sinks is None else float(sinks[head]))
        weights = torch.cat((scores.masked_fill(hidden, -math.inf), sink), 1).softmax(-1)[:, :-1]
        out[:, head] = weights @ v[:, kv_head].double()
    return out


def paged_attention_float64(problem: PagedProblem, window: int | None = None, **options: Any) -> Tensor:
    """``attention_float64`` of every row of ``problem``: [T, H, D] float64."""
    queries = problem.q.split([queries for _, queries in problem.sequences])
    keys, values = (x.split([sum(sequence) for sequence in problem.sequences]) for x in problem.packed)
    rows = zip(queries, keys, values, strict=True)
    return torch.cat([attention_float64(q, k, v, window=window, **options) for q, k, v in rows])
