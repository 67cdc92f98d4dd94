"""Paged attention on a CPU without a gather: keys and values are read through block tables, in C.

Torch's batched products need contiguous keys, so ``paged_sdpa`` copies every key and value of the batch in every layer
of every step, and pads rows to the longest. Here each (sequence, key head) follows its own block table, with the online
softmax of the Triton kernels. A few tokens of one sequence, such as drafts, are computed as a decode is: each is a
query of its own, over the keys that it sees (``paged_decode.c``). More are a prompt chunk, computed in tiles
(``paged_prefill.c``). A sequence's own number of tokens decides, so its bits do not depend on the rest of the step.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack, cast

import torch
from torch import Tensor

from paged_infer.kernels.attention.metadata import AttentionMetadata, ScoreOptions
from paged_infer.kernels.attention.mla import warn_once
from paged_infer.kernels.attention.paged_sdpa import latent_decode_batched, paged_attention_batched
from paged_infer.kernels.cpu.build import library
from paged_infer.kernels.cpu.ops import suits
from paged_infer.kernels.kv_quant import FORMATS

_MAX_GROUP_WIDTH = 4096  # MAX_TASK_WIDTH of paged_decode.c
_MAX_DIM = 256  # of a tile, which is on the stack
_FEW = 8  # tokens of a sequence in a step; more are a prompt chunk


def paged_attention_c(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionMetadata, *, window: int | None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, **scores: Unpack[ScoreOptions],
) -> Tensor:  # fmt: skip
    """q [T, H, D]; caches [num_blocks, block_size, H_kv, D], contiguous -> [T, H, D]."""
    num_heads, dim = q.shape[1:]
    _, block_size, num_kv_heads, _ = k_cache.shape
    scales = () if k_scale is None or v_scale is None else (k_scale, v_scale)
    dense = suits(q) if scales else suits(q, k_cache, v_cache)
    dense = dense and q.stride(1) == dim and all(x.is_cpu and x.is_contiguous() for x in (k_cache, v_cache, *scales))
    if (
        not dense
        or v_cache.shape != k_cache.shape
        or not takes_heads(num_heads // num_kv_heads, dim, q.dtype)
        or step.block_tables.stride(-1) != 1
        or (plan := plan_queries(step, q.dtype)) is None
    ):
        if scales:
            warn_once(
                f"keys and values of {k_cache.dtype} are read by torch, which is slower: C does not take {num_heads} "
                f"query heads of dimension {dim} over {num_kv_heads} KV heads in {q.dtype} here"
            )
        return paged_attention_batched(
            q, k_cache, v_cache, step, window=window, k_scale=k_scale, v_scale=v_scale, **scores
        )
    out = torch.empty(q.shape, dtype=q.dtype)
    kernels, scale, sinks = library(q.dtype), scores.get("scale"), scores.get("sinks")
    sinks = None if sinks is None else sinks.float().contiguous()
    tensors = (
        out.data_ptr(), q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        *([scale.data_ptr() for scale in scales] or (None, None)),
    )  # fmt: skip
    kind = FORMATS[k_cache.dtype] if scales else 0
    shape = (num_heads, num_kv_heads, dim, block_size)
    options = (
        2**62 if window is None else window, dim**-0.5 if scale is None else scale, scores.get("softcap") or 0.0,
        torch.get_num_threads(),
    )  # fmt: skip
    if plan.num_rows:
        kernels.paged_decode(
            *tensors, plan.tables.data_ptr(), plan.lengths.data_ptr(),
            None if plan.places is None else plan.places.data_ptr(), None if sinks is None else sinks.data_ptr(),
            kind, plan.num_rows, *shape, plan.tables.stride(0), q.stride(0), *options,
        )  # fmt: skip
    if plan.tasks is not None:
        kernels.paged_prefill(
            *tensors, step.block_tables.data_ptr(), step.seq_lens.data_ptr(), step.query_start_loc.data_ptr(),
            plan.tasks.data_ptr(), None if sinks is None else sinks.data_ptr(),
            kind, len(plan.tasks), *shape, step.block_tables.stride(0), q.stride(0), *options,
        )  # fmt: skip
    return out


def takes_heads(group: int, dim: int, dtype: torch.dtype) -> bool:
    """Whether C attends with heads of this size, ``group`` to a key head. bfloat16 is multiplied in pairs."""
    return group * dim <= _MAX_GROUP_WIDTH and dim <= _MAX_DIM and not (dim % 2 and dtype is torch.bfloat16)


class QueryPlan(NamedTuple):
    """The queries of a step: single ones, each with a block table and a number of keys, and tiles of prompt chunks."""

    num_rows: int
    tables: Tensor  # [num_rows, max_blocks] int32
    lengths: Tensor  # [num_rows] int32
    places: Tensor | None  # [num_rows] int32, of each query among the T; None: the first
    tasks: Tensor | None  # [num_tasks, 2] int32: the sequence, and the place of a tile's first query in its chunk


def plan_queries(step: AttentionMetadata, dtype: torch.dtype) -> QueryPlan | None:
    """None: C cannot compute this step on this system."""
    if step.max_query_len == 1:
        return QueryPlan(step.num_decodes, step.block_tables, step.seq_lens, None, None)
    if "c" not in step.plan:
        step.plan["c"] = _mixed_plan(step, library(dtype).prefill_queries())
    return cast("QueryPlan | None", step.plan["c"])


def _mixed_plan(step: AttentionMetadata, num_queries: int) -> QueryPlan | None:
    if not num_queries:
        return None
    starts, query_lens = step.query_start_loc[:-1], step.query_start_loc.diff()  # [B] each
    owners = torch.arange(len(query_lens)).repeat_interleave(query_lens)  # [T] the sequence of each token
    places = (query_lens[owners] <= _FEW).nonzero()[:, 0]
    owners = owners[places]
    seen = (step.seq_lens - query_lens - starts)[owners] + places + 1
    tasks = []
    for row, (length, count) in enumerate(zip(step.seq_lens.tolist(), query_lens.tolist(), strict=True)):
        if count > _FEW:
            tasks += [(count - first - length, row, first) for first in range(0, count, num_queries)]
    tiles = torch.tensor([task[1:] for task in sorted(tasks)], dtype=torch.int32) if tasks else None  # longest first
    return QueryPlan(len(places), step.block_tables[owners], seen.int(), places.int(), tiles)


def latent_decode_c(
    q: Tensor, cache: Tensor, step: AttentionMetadata, *, v_dim: int, scale: float,
    latent_scale: Tensor | None = None, rest_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``kernels.attention.mla.LatentDecode``: q [B, H, Dk], cache [num_blocks, block_size, 1, Dk] -> [B, H, Dv]."""
    num_rows, num_heads, dim = q.shape
    tables, lengths, q = step.block_tables, step.seq_lens, q.contiguous()
    scales = () if latent_scale is None or rest_scale is None else (latent_scale, rest_scale)
    dense = suits(q) if scales else suits(q, cache)
    dense = dense and all(x.is_cpu and x.is_contiguous() for x in (cache, *scales)) and tables.stride(-1) == 1
    if not dense or dim > _MAX_GROUP_WIDTH:
        options = {"latent_scale": latent_scale, "rest_scale": rest_scale}
        return latent_decode_batched(q, cache, step, v_dim=v_dim, scale=scale, **options)
    out = torch.empty(num_rows, num_heads, v_dim, dtype=q.dtype)
    library(q.dtype).latent_decode(
        out.data_ptr(), q.data_ptr(), cache.data_ptr(), *([one.data_ptr() for one in scales] or (None, None)),
        tables.data_ptr(), lengths.data_ptr(), FORMATS[cache.dtype] if scales else 0,
        num_rows, num_heads, dim, v_dim, cache.shape[1], tables.stride(0), scale, torch.get_num_threads(),
    )  # fmt: skip
    return out
