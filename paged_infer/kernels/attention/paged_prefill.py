"""Paged attention for prompt chunks, with or without a prefix that is in the cache already.

The loops are those of ``flash_attention``; only the addresses of keys differ. The keys of a tile may be in several
blocks, so each is looked up:   key 37  ->  table[37 // 16] = block 5  ->  slot 5 of block 5   (block_size = 16)
"""

from __future__ import annotations

from torch import Tensor

from paged_infer.kernels.attention.attention_tile import (
    attend_tile,
    code_span,
    finish_softmax,
    load_tiles,
    max_registers,
    padded,
    read_codes,
    score_factors,
    seen_by_tile,
    start_softmax,
)
from paged_infer.kernels.attention.tiles import prefill_tiles
from paged_infer.kernels.kv_quant import FORMATS, as_bytes
from paged_infer.kernels.triton_runtime import capability, launch, must_widen, tl, triton


def paged_prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, query_start_loc: Tensor,
    out: Tensor, lse: Tensor, scale: float, window: int | None, first_row: int, max_query_len: int,
    softcap: float | None, sinks: Tensor | None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill ``out`` [T, H, D], and ``lse`` [T, H] unless it is empty, for the rows from ``first_row`` on."""
    num_heads, dim = q.shape[1:]
    group, gpu = num_heads // k_cache.shape[2], capability(q.device)
    is_coded = k_scale is not None
    tile = prefill_tiles(gpu, dim, q.dtype, group, window, max_query_len, is_coded)
    block_m, block_n, num_warps, num_stages = tile[:4]
    launch(
        _prefill_kernel,
        (triton.cdiv(max_query_len, block_m), num_heads, seq_lens.shape[0] - first_row),
        q, as_bytes(k_cache), as_bytes(v_cache), out, lse, block_tables, seq_lens, query_start_loc,
        block_tables.stride(0), first_row, *score_factors(scale, softcap), window or 0, sinks, k_scale, v_scale,
        HAS_WINDOW=window is not None, SAVE_LSE=lse.numel() > 0,
        NUM_HEADS=num_heads, GROUP=group,
        STRIDE_Q=q.stride(0), STRIDE_QH=q.stride(1), STRIDE_O=out.stride(0), STRIDE_OH=out.stride(1),
        D=dim, BLOCK_D=padded(dim), BLOCK_M=block_m, BLOCK_N=block_n,
        STRIDE_BLOCK=k_cache.stride(0), STRIDE_SLOT=k_cache.stride(1), BLOCK_SIZE=k_cache.shape[1], WIDEN=must_widen(q),
        FORMAT=FORMATS[k_cache.dtype] if is_coded else 0,
        num_warps=num_warps, num_stages=num_stages, maxnreg=max_registers(q.dtype),
    )  # fmt: skip


@triton.jit
def attend_blocks(
    acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, begin, end, query, num_keys,
    scale_log2, tanh_scale, window, k_scale_ptr, v_scale_ptr,
    HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr, STRIDE_SLOT: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDEN: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Attend to keys begin..end of the sequence with the table at ``table_ptr``. All rows see all unless MASKED.

    FORMAT is 0 or, for a quantised cache, one of ``kv_quant.FORMATS``; then the scales of keys and values are read.
    """
    dim = tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)  # [N]
        if MASKED:
            block = tl.load(table_ptr + key // BLOCK_SIZE, mask=key < num_keys, other=0)
        else:
            block = tl.load(table_ptr + key // BLOCK_SIZE)
        # A pool may have more than 2^31 elements.
        offset = block.to(tl.int64) * STRIDE_BLOCK + (key % BLOCK_SIZE) * STRIDE_SLOT
        offsets = offset[:, None] + dim[None, :]  # [N, D]
        k_scale, v_scale = None, None
        if FORMAT:
            k, v = load_tiles(k_ptr + offsets, v_ptr + offsets, key < num_keys, dim, D, BLOCK_D, MASKED, False)
            k, v = read_codes(k, FORMAT).to(q.dtype), read_codes(v, FORMAT).to(q.dtype)
            vector = block.to(tl.int64) * (STRIDE_BLOCK // D) + (key % BLOCK_SIZE) * (STRIDE_SLOT // D)
            there = key < num_keys if MASKED else key >= 0
            k_scale = tl.load(k_scale_ptr + vector, mask=there, other=0.0).to(tl.float32) * code_span(FORMAT)
            v_scale = tl.load(v_scale_ptr + vector, mask=there, other=0.0).to(tl.float32) * code_span(FORMAT)
        else:
            k, v = load_tiles(k_ptr + offsets, v_ptr + offsets, key < num_keys, dim, D, BLOCK_D, MASKED, WIDEN)
        acc, row_max, row_sum = attend_tile(
            acc, row_max, row_sum, q, k, v, query, key, num_keys, scale_log2, tanh_scale, window,
            True, HAS_WINDOW, MASKED, k_scale, v_scale,
        )  # fmt: skip
    return acc, row_max, row_sum


# Values that change between steps must not compile the kernel again.
@triton.jit(do_not_specialize=["stride_table", "first_row"])
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tables_ptr, seq_lens_ptr, query_start_loc_ptr,
    stride_table, first_row, scale_log2, tanh_scale, window, sinks_ptr, k_scale_ptr, v_scale_ptr,
    HAS_WINDOW: tl.constexpr, SAVE_LSE: tl.constexpr, NUM_HEADS: tl.constexpr, GROUP: tl.constexpr,
    STRIDE_Q: tl.constexpr, STRIDE_QH: tl.constexpr, STRIDE_O: tl.constexpr, STRIDE_OH: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STRIDE_BLOCK: tl.constexpr, STRIDE_SLOT: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDEN: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    # One program: a tile of queries of one head of one sequence. The last tiles see the most keys: they start first.
    tile, row = tl.num_programs(0) - 1 - tl.program_id(0), first_row + tl.program_id(2)
    head = tl.program_id(1).to(tl.int64)
    query_start = tl.load(query_start_loc_ptr + row)
    num_queries = tl.load(query_start_loc_ptr + row + 1) - query_start
    if tile * BLOCK_M >= num_queries:
        return
    num_keys = tl.load(seq_lens_ptr + row)
    table_ptr = tables_ptr + row.to(tl.int64) * stride_table
    k_ptr += head // GROUP * D
    v_ptr += head // GROUP * D
    if FORMAT:
        k_scale_ptr += head // GROUP
        v_scale_ptr += head // GROUP

    local = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [M] of this sequence's queries
    token = (query_start + local).to(tl.int64)  # [M] of all packed queries
    dim = tl.arange(0, BLOCK_D)
    there = (local < num_queries)[:, None] & (dim < D)[None, :]
    q = tl.load(q_ptr + token[:, None] * STRIDE_Q + head * STRIDE_QH + dim[None, :], mask=there, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    query = num_keys - num_queries + local  # position in the sequence
    first = num_keys - num_queries + tile * BLOCK_M
    last = num_keys - num_queries + tl.minimum(tile * BLOCK_M + BLOCK_M, num_queries) - 1
    begin, full_begin, full_end, end = seen_by_tile(first, last, num_keys, window, True, HAS_WINDOW, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max, row_sum = start_softmax(sinks_ptr, head, BLOCK_M)
    if HAS_WINDOW:
        acc, row_max, row_sum = attend_blocks(
            acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, begin, full_begin, query,
            num_keys, scale_log2, tanh_scale, window, k_scale_ptr, v_scale_ptr, HAS_WINDOW, True, D, BLOCK_D, BLOCK_N,
            STRIDE_BLOCK, STRIDE_SLOT, BLOCK_SIZE, WIDEN, FORMAT,
        )  # fmt: skip
    acc, row_max, row_sum = attend_blocks(
        acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, full_begin, full_end, query,
        num_keys, scale_log2, tanh_scale, window, k_scale_ptr, v_scale_ptr, HAS_WINDOW, False, D, BLOCK_D, BLOCK_N,
        STRIDE_BLOCK, STRIDE_SLOT, BLOCK_SIZE, WIDEN, FORMAT,
    )  # fmt: skip
    acc, row_max, row_sum = attend_blocks(
        acc, row_max, row_sum, q, k_ptr, v_ptr, table_ptr, full_end, end, query,
        num_keys, scale_log2, tanh_scale, window, k_scale_ptr, v_scale_ptr, HAS_WINDOW, True, D, BLOCK_D, BLOCK_N,
        STRIDE_BLOCK, STRIDE_SLOT, BLOCK_SIZE, WIDEN, FORMAT,
    )  # fmt: skip

    out, lse = finish_softmax(acc, row_max, row_sum)
    tl.store(
        out_ptr + token[:, None] * STRIDE_O + head * STRIDE_OH + dim[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=there,
    )
    if SAVE_LSE:
        tl.store(lse_ptr + token * NUM_HEADS + head, lse, mask=local < num_queries)
