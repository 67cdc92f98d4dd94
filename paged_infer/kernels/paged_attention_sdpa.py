"""Paged attention from torch's own batched operations: the fastest way without a kernel of ours, and the CPU default.

Decodes (one query a sequence) are done together: each row's keys are gathered through its block table into
[B, H_kv, L, D], L the longest context, and two batched products do the rest, the query heads of a group sharing one
read of their key head. Prompt chunks are done one by one, by torch's fused attention, without padding.

What depends only on the step (which slot to read, what to mask) is worked out once and shared by all layers. Reads
past a sequence's end go to the pool's last block, which is always zero: stale numbers in a reused block, NaN
included, are never touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_infer.cache.spec import StepMeta
from paged_infer.kernels.reference import causal_mask


def paged_attention_batched(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: StepMeta, *, window: int | None
) -> Tensor:
    """q [T, H, D]; caches [num_blocks + 1, block_size, H_kv, D], the last block zero -> [T, H, D]."""
    num_decodes = step.num_decodes
    if num_decodes == q.shape[0]:
        return _decode(q, k_cache, v_cache, _decode_plan(k_cache, step, window))
    out = torch.empty_like(q)
    if num_decodes:
        out[:num_decodes] = _decode(q[:num_decodes], k_cache, v_cache, _decode_plan(k_cache, step, window))
    for chunk in _chunk_plans(k_cache, step, window):
        out[chunk.rows] = _chunk(q[chunk.rows], k_cache, v_cache, chunk)
    return out


@dataclass(frozen=True, slots=True)
class _DecodePlan:
    rows: Tensor  # [B * H_kv * L] row of the cache seen as [num_slots * H_kv, D]
    mask: Tensor  # [B * H_kv, 1, L] 0 where a token is seen, -inf elsewhere


def _decode_plan(k_cache: Tensor, step: StepMeta, window: int | None) -> _DecodePlan:
    key = ("decode", window)
    if key not in step.plan:
        step.plan[key] = _make_decode_plan(k_cache, step, window)
    return step.plan[key]


def _make_decode_plan(k_cache: Tensor, step: StepMeta, window: int | None) -> _DecodePlan:
    num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    batch = step.num_decodes
    lengths = step.seq_lens[:batch, None]  # [B, 1]
    width = int(lengths.max())
    token = torch.arange(width, device=k_cache.device)  # [L]
    seen = token < lengths
    if window is not None:
        seen &= token >= lengths - window
    slots = step.block_tables[:batch, token // block_size].long() * block_size + token % block_size  # [B, L]
    slots = slots.where(seen, (num_blocks - 1) * block_size)
    heads = torch.arange(num_kv_heads, device=k_cache.device)[:, None]
    rows = slots[:, None] * num_kv_heads + heads  # [B, H_kv, L]
    mask = torch.zeros(seen.shape, dtype=k_cache.dtype, device=k_cache.device).masked_fill_(~seen, -math.inf)
    mask = mask[:, None].expand(batch, num_kv_heads, width).reshape(-1, 1, width)
    return _DecodePlan(rows.flatten(), mask)


def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: _DecodePlan) -> Tensor:
    num_kv_heads, dim = k_cache.shape[2:]
    batch, num_heads, _ = q.shape
    shape = (batch * num_kv_heads, -1, dim)
    k = k_cache.view(-1, dim).index_select(0, plan.rows).view(shape)  # [B * H_kv, L, D]
    v = v_cache.view(-1, dim).index_select(0, plan.rows).view(shape)
    grouped = q.reshape(batch * num_kv_heads, num_heads // num_kv_heads, dim)
    scores = torch.baddbmm(
        plan.mask, grouped, k.transpose(1, 2), alpha=1 / math.sqrt(dim)
    )  # [B * H_kv, group, L]
    return torch.bmm(scores.softmax(-1), v).view(batch, num_heads, dim)


@dataclass(frozen=True, slots=True)
class _ChunkPlan:
    rows: slice  # of the packed queries
    slots: Tensor  # [context]
    mask: Tensor | None  # [N, context]; None: plain causal


def _chunk_plans(k_cache: Tensor, step: StepMeta, window: int | None) -> list[_ChunkPlan]:
    key = ("chunks", window)
    if key not in step.plan:
        step.plan[key] = _make_chunk_plans(k_cache, step, window)
    return step.plan[key]


def _make_chunk_plans(k_cache: Tensor, step: StepMeta, window: int | None) -> list[_ChunkPlan]:
    block_size = k_cache.shape[1]
    bounds, lengths = step.query_start_loc.tolist(), step.seq_lens.tolist()
    plans = []
    for row in range(step.num_decodes, len(lengths)):
        num_queries, length = bounds[row + 1] - bounds[row], lengths[row]
        token = torch.arange(length, device=k_cache.device)
        slots = step.block_tables[row, token // block_size].long() * block_size + token % block_size
        is_plain = num_queries == length and (window is None or window >= length)
        mask = None if is_plain else causal_mask(num_queries, length, window, k_cache.device)
        plans.append(_ChunkPlan(slice(bounds[row], bounds[row + 1]), slots, mask))
    return plans


def _chunk(q: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: _ChunkPlan) -> Tensor:
    k = k_cache.flatten(0, 1).index_select(0, chunk.slots)  # [context, H_kv, D]
    v = v_cache.flatten(0, 1).index_select(0, chunk.slots)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],  # [1, H, N, D]
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)
