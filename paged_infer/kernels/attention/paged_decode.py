"""Paged attention for decodes: one query per row, bound by memory traffic. Each key is read once, by one program.

    sequence of 1,000 tokens, 4 splits       [ 0 .. 255 | 256 .. 511 | 512 .. 767 | 768 .. 999 ]
    a program takes one split of one row      its output, normalised, and its log-sum-exp   (float32, in a workspace)
    and one KV head, for all query heads                          |
    that read this head                       combine: out = sum of outputs, weighted by exp(lse - greatest lse)

Three choices make it fast. The query heads of a KV group are the rows of one matrix product, so a key tile is read once
for all of them and tensor cores do the rest (GQA packing). A long context is cut into splits, so that a few long
sequences still fill the GPU (Flash-Decoding, Dao 2023). And lengths stay on the device: each row's number of splits is
computed there (``decode_plan``), within bounds that follow from the batch, the chip and the longest length that the
caller promises, so one compiled kernel serves every step and a CUDA graph can hold the launch. A row of one split is
written to the output at once. A split that holds no key writes a log-sum-exp of -inf, and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paged_infer.kernels.attention.attention_tile import (
    finish_softmax,
    max_registers,
    padded,
    score_factors,
    start_softmax,
)
from paged_infer.kernels.attention.decode_plan import DecodePlan, plan_decode, split_bounds
from paged_infer.kernels.attention.paged_prefill import attend_blocks
from paged_infer.kernels.attention.tiles import decode_tiles
from paged_infer.kernels.kv_quant import FORMATS, as_bytes
from paged_infer.kernels.triton_runtime import capability, launch, must_widen, num_processors, tl, triton

_COMBINED_AT_ONCE = 32


def paged_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, query_start_loc: Tensor,
    out: Tensor, lse: Tensor, scale: float, window: int | None, num_rows: int, max_seq_len: int, shared: dict[Any, Any],
    softcap: float | None, sinks: Tensor | None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill ``out`` [T, H, D], and ``lse`` [T, H] unless it is empty, for the first ``num_rows`` rows.

    ``shared`` keeps the plan of splits for further calls with the same rows (``AttentionMetadata.plan``).
    """
    num_heads, dim = q.shape[1:]
    num_kv_heads = k_cache.shape[2]
    group = num_heads // num_kv_heads
    is_coded = k_scale is not None
    tile, rule = decode_tiles(capability(q.device), dim, q.dtype, group, is_coded)
    block_g, block_n, num_warps, num_stages = tile[:4]
    head_tiles = triton.cdiv(group, block_g)
    max_keys = min(max_seq_len, window or max_seq_len)
    bounds = split_bounds(rule, num_rows, num_kv_heads * head_tiles, max_keys, num_processors(q.device))
    is_split = bounds.max_split_rows > 0
    plan = None
    if is_split and num_rows > 0:
        if (key := ("decode splits", num_rows, max_keys, bounds)) not in shared:
            shared[key] = plan_decode(seq_lens, num_rows, max_keys, bounds)
        plan = shared[key]
    parts = (bounds.max_items, num_heads)
    partial_out = torch.empty((*parts, dim) if is_split else 0, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(parts if is_split else 0, dtype=torch.float32, device=q.device)
    launch(
        _decode_kernel,
        (num_kv_heads * head_tiles, bounds.max_items),
        q, as_bytes(k_cache), as_bytes(v_cache), out, lse, partial_out, partial_lse,
        block_tables, seq_lens, query_start_loc,
        *(plan[:2] if plan else (None, None)), num_rows, block_tables.stride(0),
        *score_factors(scale, softcap), window or 0, sinks, k_scale, v_scale,
        HAS_WINDOW=window is not None, SAVE_LSE=lse.numel() > 0, IS_SPLIT=is_split,
        NUM_HEADS=num_heads, GROUP=group, HEAD_TILES=head_tiles, BLOCK_G=block_g,
        STRIDE_Q=q.stride(0), STRIDE_QH=q.stride(1), STRIDE_O=out.stride(0), STRIDE_OH=out.stride(1),
        D=dim, BLOCK_D=padded(dim), BLOCK_N=block_n,
        STRIDE_BLOCK=k_cache.stride(0), STRIDE_SLOT=k_cache.stride(1), BLOCK_SIZE=k_cache.shape[1], WIDEN=must_widen(q),
        FORMAT=FORMATS[k_cache.dtype] if is_coded else 0,
        num_warps=num_warps, num_stages=num_stages,
        maxnreg=max_registers(q.dtype) if dim <= 128 else None,  # wider heads spill with a limit, others without
    )  # fmt: skip
    if plan:
        combine_splits(partial_out, partial_lse, out, lse, query_start_loc, plan, num_rows)


def combine_splits(
    partial_out: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor, query_start_loc: Tensor, plan: DecodePlan,
    num_rows: int,
) -> None:  # fmt: skip
    """Fill ``out`` [T, H, D] for the rows of ``plan`` that have more than one split, from those of all rows."""
    num_heads, dim = out.shape[1:]
    launch(
        _combine_kernel,
        (num_heads, len(plan.split_rows)),
        partial_out, partial_lse, out, lse, query_start_loc, plan.starts, plan.split_rows, num_rows,
        SAVE_LSE=lse.numel() > 0, CHUNK=_COMBINED_AT_ONCE if dim <= 256 else _COMBINED_AT_ONCE // 4,
        NUM_HEADS=num_heads, STRIDE_O=out.stride(0), STRIDE_OH=out.stride(1), D=dim, BLOCK_D=padded(dim),
        maxnreg=max_registers(out.dtype),
    )  # fmt: skip


# Values that change between steps must not compile the kernel again.
@triton.jit(do_not_specialize=["num_rows", "stride_table"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, tables_ptr, seq_lens_ptr,
    query_start_loc_ptr, starts_ptr, item_rows_ptr, num_rows, stride_table, scale_log2, tanh_scale, window, sinks_ptr,
    k_scale_ptr, v_scale_ptr,
    HAS_WINDOW: tl.constexpr, SAVE_LSE: tl.constexpr, IS_SPLIT: tl.constexpr, NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr, HEAD_TILES: tl.constexpr, BLOCK_G: tl.constexpr,
    STRIDE_Q: tl.constexpr, STRIDE_QH: tl.constexpr, STRIDE_O: tl.constexpr, STRIDE_OH: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr, STRIDE_SLOT: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDEN: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    # KV heads are the fastest axis: the heads of a slot are adjacent in memory.
    kv_head, item = tl.program_id(0) // HEAD_TILES, tl.program_id(1)
    row, split, splits = item, 0, 1
    if IS_SPLIT:
        if item >= tl.load(starts_ptr + num_rows):
            return
        row = tl.load(item_rows_ptr + item)
        first_item = tl.load(starts_ptr + row)
        split, splits = item - first_item, tl.load(starts_ptr + row + 1) - first_item
    length = tl.load(seq_lens_ptr + row)
    token = tl.load(query_start_loc_ptr + row).to(tl.int64)
    # 1, or 0 in a padding row, for which nothing is written.
    has_query = tl.minimum((tl.load(query_start_loc_ptr + row + 1) - token).to(tl.int32), 1)
    first_key = 0
    if HAS_WINDOW:
        first_key = tl.maximum(length - window, 0)
    keys_per_split = tl.cdiv(tl.cdiv(length - first_key, splits), BLOCK_N) * BLOCK_N
    begin = first_key + split * keys_per_split
    end = tl.minimum(begin + keys_per_split, length)
    full_end = begin + tl.maximum(end - begin, 0) // BLOCK_N * BLOCK_N

    member = tl.program_id(0) % HEAD_TILES * BLOCK_G + tl.arange(0, BLOCK_G)  # [G] query heads of this KV head
    head = (kv_head * GROUP + member).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    is_head = member < GROUP * has_query
    there = is_head[:, None] & (dim < D)[None, :]
    q = tl.load(q_ptr + token * STRIDE_Q + head[:, None] * STRIDE_QH + dim[None, :], mask=there, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    query = tl.full([BLOCK_G], 0, tl.int32) + (length - 1)
    k_ptr += kv_head * D
    v_ptr += kv_head * D
    if FORMAT:
        k_scale_ptr += kv_head
        v_scale_ptr += kv_head
    table_ptr = tables_ptr + row.to(tl.int64) * stride_table

    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    row_max, row_sum = start_softmax(sinks_ptr, tl.minimum(head, NUM_HEADS - 1), BLOCK_G)
    if IS_SPLIT and sinks_ptr is not None:  # only the first split counts the sink
        row_max, row_sum = tl.where(split == 0, row_max, float("-inf")), tl.where(split == 0, row_sum, 0.0)
    # The window is cut exactly at first_key, so only the last tile of a split needs a mask.
    acc, row_max, row_sum = attend_blocks(
        acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, begin, full_end, query,
        length, scale_log2, tanh_scale, window, k_scale_ptr, v_scale_ptr, False, False, D, BLOCK_D, BLOCK_N,
        STRIDE_BLOCK, STRIDE_SLOT, BLOCK_SIZE, WIDEN, FORMAT,
    )  # fmt: skip
    acc, row_max, row_sum = attend_blocks(
        acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, full_end, end, query,
        end, scale_log2, tanh_scale, window, k_scale_ptr, v_scale_ptr, False, True, D, BLOCK_D, BLOCK_N,
        STRIDE_BLOCK, STRIDE_SLOT, BLOCK_SIZE, WIDEN, FORMAT,
    )  # fmt: skip
    out, lse = finish_softmax(acc, row_max, row_sum)

    if splits == 1:
        place = out_ptr + token * STRIDE_O + head[:, None] * STRIDE_OH + dim[None, :]
        tl.store(place, out.to(out_ptr.dtype.element_ty), mask=there)
        if SAVE_LSE:
            tl.store(lse_ptr + token * NUM_HEADS + head, lse, mask=is_head)
    else:
        part = item.to(tl.int64) * NUM_HEADS + head  # [G]
        tl.store(partial_lse_ptr + part, lse, mask=is_head)
        width = tl.where(begin < end, D, 0)
        written = is_head[:, None] & (dim < width)[None, :]
        tl.store(partial_out_ptr + part[:, None] * D + dim[None, :], out, mask=written)


@triton.jit(do_not_specialize=["num_rows"])
def _combine_kernel(
    partial_out_ptr, partial_lse_ptr, out_ptr, lse_ptr, query_start_loc_ptr, starts_ptr, split_rows_ptr, num_rows,
    SAVE_LSE: tl.constexpr, CHUNK: tl.constexpr,
    NUM_HEADS: tl.constexpr, STRIDE_O: tl.constexpr, STRIDE_OH: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if index >= tl.load(starts_ptr + num_rows + 1):
        return
    row = tl.load(split_rows_ptr + index)
    first_item = tl.load(starts_ptr + row)
    splits = tl.load(starts_ptr + row + 1) - first_item
    token = tl.load(query_start_loc_ptr + row).to(tl.int64)
    has_query = tl.minimum((tl.load(query_start_loc_ptr + row + 1) - token).to(tl.int32), 1)
    dim = tl.arange(0, BLOCK_D)
    parts = first_item.to(tl.int64) * NUM_HEADS + head  # of split 0; the stride of a split is NUM_HEADS

    greatest, total = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)
        lse = tl.load(partial_lse_ptr + parts + split * NUM_HEADS, mask=split < splits, other=float("-inf"))
        # An empty split wrote no output, so its memory may hold NaN, and 0 * NaN is NaN. NaN from the cache is kept.
        wrote = (lse != float("-inf"))[:, None] & (dim < D)[None, :]
        part = tl.load(partial_out_ptr + (parts + split * NUM_HEADS)[:, None] * D + dim[None, :], mask=wrote, other=0.0)
        new_greatest = tl.maximum(greatest, tl.max(lse, 0))
        shift = tl.where(new_greatest == float("-inf"), 0.0, new_greatest)
        weights, shrink = tl.exp(lse - shift), tl.exp(greatest - shift)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(part * weights[:, None], 0)
        greatest = new_greatest
    seen = total != 0.0
    divisor = tl.where(seen, total, 1.0)
    place = out_ptr + token * STRIDE_O + head * STRIDE_OH + dim
    tl.store(place, (acc / divisor).to(out_ptr.dtype.element_ty), mask=dim < D * has_query)
    if SAVE_LSE:
        lse = tl.where(seen, greatest + tl.log(divisor), float("-inf"))
        tl.store(lse_ptr + token * NUM_HEADS + head, lse, mask=has_query > 0)
