"""Paged attention with torch's batched operations: the default on a CPU without a C compiler.

Decodes (one query per sequence) are batched: the keys of each row are gathered through its block table into
[B, H_kv, L, D], where L is the longest context, and two batched products follow, in which the query heads of a group
share one read of their key head. Rows of similar length form separate batches where that saves more than it costs, so
one long context does not widen all others. Prompt chunks are computed one by one with torch's fused attention, without
padding.

What depends on the step alone (the slots to read, the masks) is computed once and shared by all layers. Reads past the
end of a sequence go to the pool's last block, which is always zero: stale values in a reused block, NaN included, are
never read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass
from typing import NamedTuple, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paged_infer.kernels.attention.flash_attention import attend_seen, causal_mask
from paged_infer.kernels.attention.metadata import AttentionMetadata, ScoreOptions
from paged_infer.kernels.kv_quant import dequantise_kv, dequantise_latents


def paged_attention_batched(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionMetadata, *, window: int | None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, **scores: Unpack[ScoreOptions],
) -> Tensor:  # fmt: skip
    """q [T, H, D]; caches [num_blocks + 1, block_size, H_kv, D], the last block zero -> [T, H, D]."""
    keys, values = _Stored(k_cache, k_scale, q.dtype), _Stored(v_cache, v_scale, q.dtype)
    key = ("decodes", window)
    if key not in step.plan:
        step.plan[key] = _decode_plans(k_cache, step, window, q.dtype)
    out = torch.empty_like(q)
    for decode in step.plan[key]:
        out[decode.rows] = _decode(q[decode.rows], keys, values, decode, **scores)
    key = ("chunks", window)
    if key not in step.plan:
        step.plan[key] = _chunk_plans(k_cache, step, window)
    for chunk in step.plan[key]:
        out[chunk.rows] = _chunk(q[chunk.rows], keys, values, chunk, **scores)
    return out


class _Stored(NamedTuple):
    """The keys or values of a layer; quantised ones are dequantised to ``dtype`` as they are read."""

    cache: Tensor  # [num_blocks + 1, block_size, H_kv, D]
    scale: Tensor | None  # [num_blocks + 1, block_size, H_kv], of a quantised cache
    dtype: torch.dtype

    def gather(self, places: Tensor, dims: int) -> Tensor:
        """Rows ``places`` [R] of the cache, whose first ``dims`` dimensions are flattened, and so are the scales'."""
        stored = self.cache.flatten(0, dims - 1).index_select(0, places)
        if self.scale is None:
            return stored
        return dequantise_kv(stored, self.scale.flatten(0, dims - 1).index_select(0, places), self.dtype)


@dataclass(frozen=True, slots=True)
class _DecodePlan:
    rows: slice  # of the packed queries, B of them
    reads: Tensor  # [B * H_kv * L] rows of the cache, viewed as [num_slots * H_kv, D]
    mask: Tensor  # [B * H_kv, 1, L] 0 where a token is seen, -inf elsewhere


def _decode_plans(
    k_cache: Tensor, step: AttentionMetadata, window: int | None, dtype: torch.dtype
) -> list[_DecodePlan]:  # fmt: skip
    num_blocks, block_size, num_kv_heads, dim = k_cache.shape
    device = k_cache.device
    heads = torch.arange(num_kv_heads, device=device)[:, None]
    seen_lens = step.seq_lens[: step.num_decodes]  # number of tokens that each query sees
    if window is not None:
        seen_lens = seen_lens.clamp(max=window)
    plans = []
    for rows in similar_rows(seen_lens.tolist(), _SPLIT_ELEMENTS // (num_kv_heads * dim)):
        lengths = step.seq_lens[rows, None]  # [B, 1]
        width = int(seen_lens[rows].max())
        first = (lengths - width).clamp(min=0)  # 0 unless a window hides what is older
        token = first + torch.arange(width, device=device)  # [B, L]
        seen = (token < lengths) & (token >= lengths - seen_lens[rows, None])
        blocks = step.block_tables[rows].gather(1, (token // block_size).where(seen, 0))
        slots = (blocks.long() * block_size + token % block_size).where(seen, (num_blocks - 1) * block_size)
        reads = slots[:, None] * num_kv_heads + heads  # [B, H_kv, L]
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -math.inf)
        mask = mask[:, None].expand(-1, num_kv_heads, -1).reshape(-1, 1, width)
        plans.append(_DecodePlan(rows, reads.flatten(), mask))
    return plans


# Elements of padding that cost as much to gather as one more batch of rows: about 30 us on a CPU.
_SPLIT_ELEMENTS = 1 << 16


def similar_rows(lengths: ReadOnlyList[int], worth_a_split: int) -> list[slice]:
    """Cut rows of descending length into runs, where a cut saves at least ``worth_a_split`` tokens of padding.

    >>> similar_rows([100, 90, 4, 3], worth_a_split=50)
    [slice(0, 2, None), slice(2, 4, None)]
    """
    runs, uncut = [], [slice(0, len(lengths))] if lengths else []
    while uncut:
        run = uncut.pop()
        part = np.asarray(lengths[run])
        saved = np.arange(len(part) - 1, 0, -1) * (part[:1] - part[1:])  # by a cut after each row but the last
        if len(saved) and saved.max() >= worth_a_split:
            cut = run.start + int(saved.argmax()) + 1
            uncut += [slice(cut, run.stop), slice(run.start, cut)]
        else:
            runs.append(run)
    return runs


def _decode(
    q: Tensor, keys: _Stored, values: _Stored, plan: _DecodePlan,
    scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    num_kv_heads, dim = keys.cache.shape[2:]
    batch, num_heads, _ = q.shape
    shape = (batch * num_kv_heads, -1, dim)
    k, v = (stored.gather(plan.reads, 3).view(shape) for stored in (keys, values))  # [B * H_kv, L, D]
    grouped = q.reshape(batch * num_kv_heads, num_heads // num_kv_heads, dim)
    if softcap is not None or sinks is not None:  # the query heads of a group are queries of their key head
        grouped, k, v, seen = (x.unflatten(0, (batch, num_kv_heads)) for x in (grouped, k, v, plan.mask == 0))
        own = None if sinks is None else sinks.view(num_kv_heads, -1, 1)
        return attend_seen(grouped, k, v, seen, scale, softcap, own)[0].view(batch, num_heads, dim)
    scale = dim**-0.5 if scale is None else scale
    scores = torch.baddbmm(plan.mask, grouped, k.transpose(1, 2), alpha=scale)  # [B * H_kv, group, L]
    return torch.bmm(scores.softmax(-1), v).view(batch, num_heads, dim)


def latent_decode_batched(
    q: Tensor, cache: Tensor, step: AttentionMetadata, *, v_dim: int, scale: float,
    latent_scale: Tensor | None = None, rest_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``kernels.attention.mla.LatentDecode``: each latent is gathered once for all heads, and is key and value."""
    key = ("decodes", None)
    if key not in step.plan:
        step.plan[key] = _decode_plans(cache, step, None, q.dtype)
    out = q.new_empty(*q.shape[:2], v_dim)
    for plan in step.plan[key]:
        rows = q[plan.rows]
        latents = cache.view(-1, q.shape[2]).index_select(0, plan.reads)
        if latent_scale is not None and rest_scale is not None:
            first, rest = (one.flatten().index_select(0, plan.reads) for one in (latent_scale, rest_scale))
            latents = dequantise_latents(latents, v_dim, first, rest, q.dtype)
        latents = latents.unflatten(0, (len(rows), -1))  # [B, L, Dk]
        scores = torch.baddbmm(plan.mask, rows, latents.transpose(1, 2), alpha=scale)  # [B, H, L]
        out[plan.rows] = torch.bmm(scores.softmax(-1), latents[..., :v_dim])
    return out


@dataclass(frozen=True, slots=True)
class _ChunkPlan:
    rows: slice  # of the packed queries
    slots: Tensor  # [context]
    mask: Tensor | None  # [N, context]; None: plain causal


def _chunk_plans(k_cache: Tensor, step: AttentionMetadata, window: int | None) -> list[_ChunkPlan]:
    block_size = k_cache.shape[1]
    bounds, lengths = step.query_start_loc.tolist(), step.seq_lens.tolist()
    plans: list[_ChunkPlan] = []
    for row in range(step.num_decodes, len(lengths)):
        num_queries, length = bounds[row + 1] - bounds[row], lengths[row]
        token = torch.arange(length, device=k_cache.device)
        slots = step.block_tables[row, token // block_size].long() * block_size + token % block_size
        is_plain = num_queries == length and (window is None or window >= length)
        mask = None if is_plain else causal_mask(num_queries, length, window, k_cache.device)
        plans.append(_ChunkPlan(slice(bounds[row], bounds[row + 1]), slots, mask))
    return plans


def _chunk(q: Tensor, keys: _Stored, values: _Stored, chunk: _ChunkPlan, **scores: Unpack[ScoreOptions]) -> Tensor:
    k, v = (stored.gather(chunk.slots, 2) for stored in (keys, values))  # [context, H_kv, D]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H or H_kv, N or context, D]
    return masked_sdpa(q, k, v, chunk.mask, **scores)[0].transpose(0, 1)


_MAX_SCORES = 1 << 26  # held at once, in float32


def masked_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *,
    scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q [B, H, N, D], k and v [B, H_kv, M, D] -> [B, H, N, D] by torch's fused attention, or in plain torch.

    Fused attention has neither a soft cap nor sinks. ``mask`` [..., N, M] is True where a query sees a key; None: plain
    causal, N = M.
    """
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    mask = causal_mask(q.shape[2], k.shape[2], None, q.device) if mask is None else mask
    num_queries = max(1, _MAX_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = zip(q.split(num_queries, 2), mask.split(num_queries, -2), strict=True)
    own = None if sinks is None else sinks[:, None, None]
    return torch.cat([attend_seen(part, k, v, seen, scale, softcap, own)[0] for part, seen in parts], 2)
