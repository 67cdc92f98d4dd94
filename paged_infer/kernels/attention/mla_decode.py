"""Decode of MLA in Triton: all query heads of a row read its latents, each of which is key and value (``mla``).

    a program takes 16 heads, one split of one row          q  [16, 512 | 64]
    each tile of 32 latents is loaded once                  latent  [32, 512 | 64]
    scores [16, 32] = q x latent^T,  acc [16, 512] += weights x latent[:, :512]

The latent and the key's rotated part are loaded separately, because tiles are powers of two and 576 is not. The latent
stays in shared memory for both products, as in FlashMLA (DeepSeek, 2025). Splits and their combination are those of
``paged_decode``. H / 16 programs read the same latents, all but the first from L2.

Quantised latents are converted to q's dtype. Their two scales multiply the two parts of a score, and the first one also
multiplies the softmax weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_infer.kernels.attention.attention_tile import (
    LOG2_E,
    code_span,
    finish_softmax,
    max_registers,
    padded,
    read_codes,
)
from paged_infer.kernels.attention.decode_plan import plan_decode, split_bounds
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.attention.mla import LATENT_SCALES, latent_decode_reference, warn_once
from paged_infer.kernels.attention.paged_decode import combine_splits
from paged_infer.kernels.attention.tiles import latent_tiles
from paged_infer.kernels.checks import FLOATS, check_codes, layouts, on_one_device, shapes
from paged_infer.kernels.kv_quant import FORMATS, as_bytes
from paged_infer.kernels.triton_runtime import capability, launch, must_widen, num_processors, tl, triton

MAX_WIDTH = 576  # of the padded latent and the padded rest together


def latent_decode(
    q: Tensor, cache: Tensor, step: AttentionMetadata, *, v_dim: int, scale: float,
    latent_scale: Tensor | None = None, rest_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``mla.LatentDecode``: q [B, H, Dk] with dense heads, cache [num_blocks, block_size, 1, Dk] -> [B, H, Dv].

    The host reads no length. The reference computes widths that do not fit (Dk > 576 or Dv > 512), with a warning.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit; the message names them.
    """
    _check(q, cache, step, v_dim, latent_scale, rest_scale)
    num_rows, num_heads, dim = q.shape
    rest = dim - v_dim
    if padded(v_dim) + (padded(rest) if rest else 0) > MAX_WIDTH:
        warn_once(f"MLA uses the torch reference: its latents have {v_dim} + {rest} elements, the kernel's 512 + 64")
        scales = {"latent_scale": latent_scale, "rest_scale": rest_scale}
        return latent_decode_reference(q, cache, step, v_dim=v_dim, scale=scale, **scales)
    is_coded = latent_scale is not None
    (block_g, block_n, num_warps, num_stages, _), rule = latent_tiles(capability(q.device), q.dtype, is_coded)
    head_tiles = triton.cdiv(num_heads, block_g)
    bounds = split_bounds(rule, num_rows, head_tiles, step.max_seq_len, num_processors(q.device))
    is_split = bounds.max_split_rows > 0 and num_rows > 0
    plan = None
    if is_split:
        if (key := ("latent splits", bounds)) not in step.plan:
            step.plan[key] = plan_decode(step.seq_lens, num_rows, step.max_seq_len, bounds)
        plan = step.plan[key]
    out = q.new_empty(num_rows, num_heads, v_dim)
    parts = (bounds.max_items, num_heads)
    partial_out = torch.empty((*parts, v_dim) if is_split else 0, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(parts if is_split else 0, dtype=torch.float32, device=q.device)
    launch(
        _latent_decode_kernel,
        (head_tiles, bounds.max_items),
        q, as_bytes(cache), latent_scale, rest_scale, out, partial_out, partial_lse, step.block_tables, step.seq_lens,
        *(plan[:2] if plan else (None, None)), num_rows, step.block_tables.stride(0), scale * LOG2_E,
        IS_SPLIT=is_split, NUM_HEADS=num_heads, BLOCK_G=block_g,
        STRIDE_Q=q.stride(0), STRIDE_QH=q.stride(1), DV=v_dim, DR=rest, BLOCK_V=padded(v_dim), BLOCK_R=padded(rest),
        BLOCK_N=block_n, STRIDE_BLOCK=cache.stride(0), STRIDE_SLOT=cache.stride(1), BLOCK_SIZE=cache.shape[1],
        WIDEN=must_widen(q), FORMAT=FORMATS[cache.dtype] if is_coded else 0,
        num_warps=num_warps, num_stages=num_stages, maxnreg=max_registers(q.dtype),
    )  # fmt: skip
    if plan:
        no_lse = out.new_empty(0, dtype=torch.float32)
        combine_splits(partial_out, partial_lse, out, no_lse, step.query_start_loc, plan, num_rows)
    return out


@triton.jit
def _attend_latents(
    acc, row_max, row_sum, q, q_rest, cache_ptr, latent_scale_ptr, rest_scale_ptr, table_ptr, begin, end, scale_log2,
    MASKED: tl.constexpr, DV: tl.constexpr, DR: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, STRIDE_BLOCK: tl.constexpr, STRIDE_SLOT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WIDEN: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Attend to latents begin..end of the sequence with the table at ``table_ptr``; the last tile is MASKED."""
    dim, rest = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_R)
    for start in tl.range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)  # [N]
        there = key < end if MASKED else key >= 0
        block = tl.load(table_ptr + key // BLOCK_SIZE, mask=there, other=0)
        offset = (block.to(tl.int64) * STRIDE_BLOCK + (key % BLOCK_SIZE) * STRIDE_SLOT)[:, None]
        slot = block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE  # index into the scales
        latent_ptrs = cache_ptr + offset + dim[None, :]
        if MASKED or DV != BLOCK_V:
            latent = tl.load(latent_ptrs, mask=there[:, None] & (dim < DV)[None, :], other=0.0)  # [N, V]
        else:
            latent = tl.load(latent_ptrs)
        if FORMAT:
            latent = read_codes(latent, FORMAT).to(q.dtype)
        elif WIDEN:
            latent = latent.to(tl.float32)
        scores = tl.dot(q, tl.trans(latent), input_precision="ieee")  # [G, N]
        if FORMAT:
            latent_scale = tl.load(latent_scale_ptr + slot, mask=there, other=0.0).to(tl.float32) * code_span(FORMAT)
            scores *= latent_scale[None, :]
        if DR > 0:
            k_rest = tl.load(
                cache_ptr + DV + offset + rest[None, :], mask=there[:, None] & (rest < DR)[None, :], other=0.0
            )
            if FORMAT:
                rest_scale = tl.load(rest_scale_ptr + slot, mask=there, other=0.0).to(tl.float32) * code_span(FORMAT)
                k_rest = read_codes(k_rest, FORMAT).to(q.dtype)
                scores += tl.dot(q_rest, tl.trans(k_rest), input_precision="ieee") * rest_scale[None, :]
            else:
                if WIDEN:
                    k_rest = k_rest.to(tl.float32)
                scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
        if MASKED:
            scores = tl.where(there[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)  # in powers of two; each tile has a key
        weights = tl.math.exp2(scores * scale_log2 - new_max[:, None])  # [G, N]
        shrink = tl.math.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        if FORMAT:
            weights *= latent_scale[None, :]
        acc = tl.dot(weights.to(latent.dtype), latent, acc * shrink[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


# Values that change between steps must not compile the kernel again.
@triton.jit(do_not_specialize=["num_rows", "stride_table"])
def _latent_decode_kernel(
    q_ptr, cache_ptr, latent_scale_ptr, rest_scale_ptr, out_ptr, partial_out_ptr, partial_lse_ptr, tables_ptr,
    seq_lens_ptr, starts_ptr, item_rows_ptr, num_rows, stride_table, scale_log2,
    IS_SPLIT: tl.constexpr, NUM_HEADS: tl.constexpr, BLOCK_G: tl.constexpr,
    STRIDE_Q: tl.constexpr, STRIDE_QH: tl.constexpr, DV: tl.constexpr, DR: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr, STRIDE_SLOT: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDEN: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(1)
    row, split, splits = item, 0, 1
    if IS_SPLIT:
        if item >= tl.load(starts_ptr + num_rows):
            return
        row = tl.load(item_rows_ptr + item)
        first_item = tl.load(starts_ptr + row)
        split, splits = item - first_item, tl.load(starts_ptr + row + 1) - first_item
    length = tl.load(seq_lens_ptr + row)
    keys_per_split = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, length)
    full_end = begin + tl.maximum(end - begin, 0) // BLOCK_N * BLOCK_N

    head = (tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)).to(tl.int64)  # [G]
    dim, rest = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_R)
    is_head = head < NUM_HEADS
    there = is_head[:, None] & (dim < DV)[None, :]
    q_ptr += row.to(tl.int64) * STRIDE_Q
    q = tl.load(q_ptr + head[:, None] * STRIDE_QH + dim[None, :], mask=there, other=0.0)
    rest_there = is_head[:, None] & (rest < DR)[None, :]
    q_rest = tl.load(q_ptr + head[:, None] * STRIDE_QH + DV + rest[None, :], mask=rest_there, other=0.0)
    if WIDEN:
        q, q_rest = q.to(tl.float32), q_rest.to(tl.float32)
    table_ptr = tables_ptr + row.to(tl.int64) * stride_table

    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    row_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_G], tl.float32)
    acc, row_max, row_sum = _attend_latents(
        acc, row_max, row_sum, q, q_rest, cache_ptr, latent_scale_ptr, rest_scale_ptr, table_ptr, begin, full_end,
        scale_log2, False, DV, DR, BLOCK_V, BLOCK_R, BLOCK_N, STRIDE_BLOCK, STRIDE_SLOT, BLOCK_SIZE, WIDEN, FORMAT,
    )  # fmt: skip
    acc, row_max, row_sum = _attend_latents(
        acc, row_max, row_sum, q, q_rest, cache_ptr, latent_scale_ptr, rest_scale_ptr, table_ptr, full_end, end,
        scale_log2, True, DV, DR, BLOCK_V, BLOCK_R, BLOCK_N, STRIDE_BLOCK, STRIDE_SLOT, BLOCK_SIZE, WIDEN, FORMAT,
    )  # fmt: skip
    out, lse = finish_softmax(acc, row_max, row_sum)

    if splits == 1:
        place = (row.to(tl.int64) * NUM_HEADS + head) * DV
        tl.store(out_ptr + place[:, None] + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=there)
    else:
        part = item.to(tl.int64) * NUM_HEADS + head  # [G]
        tl.store(partial_lse_ptr + part, lse, mask=is_head)
        width = tl.where(begin < end, DV, 0)
        tl.store(
            partial_out_ptr + part[:, None] * DV + dim[None, :], out, mask=is_head[:, None] & (dim < width)[None, :]
        )


def _check(
    q: Tensor,
    cache: Tensor,
    step: AttentionMetadata,
    v_dim: int,
    latent_scale: Tensor | None,
    rest_scale: Tensor | None,
) -> None:
    if latent_scale is not None or rest_scale is not None:
        check_codes(cache, cache, latent_scale, rest_scale, LATENT_SCALES)
    index = {"block_tables": step.block_tables, "seq_lens": step.seq_lens, "query_start_loc": step.query_start_loc}
    tensors = {"q": q, "cache": cache} | index
    fits = q.dim() == 3 and cache.dim() == 4 and cache.shape[2:] == (1, q.shape[2]) and 0 < v_dim <= q.shape[2]
    fits = fits and step.block_tables.dim() == 2 and len(step.block_tables) == len(step.seq_lens) == len(q)
    if not fits or step.query_start_loc.shape != (len(q) + 1,):
        raise ValueError(
            "latent_decode expects q [B, H, Dk], cache [num_blocks, block_size, 1, Dk], block_tables [B, max_blocks], "
            f"seq_lens [B], query_start_loc [B + 1], Dv within 1..Dk; got Dv {v_dim}, " + shapes(**tensors)
        )
    alike = (latent_scale is not None or q.dtype == cache.dtype) and q.dtype in FLOATS and on_one_device(**tensors)
    dense = cache.is_contiguous() and q.stride(2) == 1 and step.block_tables.stride(1) == 1
    if not (alike and dense and {x.dtype for x in index.values()} == {torch.int32}):
        raise ValueError(
            "latent_decode expects one device, one dtype of float32, float16 and bfloat16, int32 indices, dense rows, "
            "a contiguous cache; got " + layouts(**tensors)
        )
