"""``flash_attention`` with keys and values loaded by the tensor memory accelerator (TMA), on sm90 and later.

    pointers      256 threads, 16 addresses and 16 copies each, for one tile of keys
    descriptor    one thread, one instruction: the tile at [batch, head, key, 0] of a tensor described on the host

A descriptor holds the address, shape and strides, so no thread computes an address and no register holds one. Keys
past the end arrive as zeros. ``flash_attention`` calls this if a table of measured tiles has ``use_tma``; none has yet,
since a sweep on a GPU has to show which is faster. The arithmetic (``attention_tile``) is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paged_infer.kernels.attention.attention_tile import (
    attend_tile,
    finish_softmax,
    score_factors,
    seen_by_tile,
    start_softmax,
)
from paged_infer.kernels.attention.checks import check_dense_attention
from paged_infer.kernels.attention.tile_table import TMA_HEAD_DIMS, Tile
from paged_infer.kernels.triton_runtime import capability, launch, must_widen, tl, triton

TMA_TILE = Tile(128, 128, 8, 2)


def flash_attention_tma(
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool = True, scale: float | None = None, tile: Tile | None = None,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Exact attention: q [B, H, N, D], k and v [B, H_kv, M, D] -> [B, H, N, D], as ``flash_attention`` gives it.

    Args:
        tile: default ``TMA_TILE``; small in the interpreter.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; head_dim is neither 64 nor 128; float32; a stride
            or an address is no multiple of 16 bytes; the device is older than sm90.
    """
    check_dense_attention(q, k, v, causal, scale, None, softcap, sinks)
    batch, num_heads, num_queries, dim = q.shape
    num_keys = k.shape[2]
    if reason := why_not_tma(q, k, v):
        raise ValueError(reason)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if 0 in out.shape or num_keys == 0:
        return out.zero_()
    is_interpreted = capability(q.device) == (0, 0)
    block_m, block_n, num_warps, num_stages, _ = tile or (Tile(16, 16, 4, 1) if is_interpreted else TMA_TILE)
    launch(
        _flash_tma_kernel,
        (triton.cdiv(num_queries, block_m) * batch * num_heads,),
        q, _described(k, block_n), _described(v, block_n), out, *q.stride()[:3],
        num_heads, num_heads // k.shape[1], num_queries, num_keys,
        *score_factors(dim**-0.5 if scale is None else scale, softcap), sinks,
        CAUSAL=causal, D=dim, BLOCK_M=block_m, BLOCK_N=block_n, WIDEN=must_widen(q),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def why_not_tma(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why these tensors cannot be loaded by TMA, or an empty string."""
    gpu, dim = capability(q.device), q.shape[3]
    if dim not in TMA_HEAD_DIMS or q.dtype == torch.float32 or (gpu != (0, 0) and gpu < (9, 0)):
        return f"TMA takes 16-bit tensors of head_dim 64 or 128 on sm90 or later; got {q.dtype}, {dim}, {gpu}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1 or any(stride % 8 for stride in x.stride()[:3]) or x.data_ptr() % 16:
            return f"{name}: rows must be dense, strides and address multiples of 16 bytes; got {x.stride()}"
    return ""


def _described(x: Tensor, rows: int) -> Any:
    """A descriptor of x [B, heads, M, D] in tiles of ``rows`` rows of one head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, x.shape[3]])


@triton.jit
def _attend_described(
    acc, row_max, row_sum, q, k_desc, v_desc, batch, kv_head, begin, end, query, num_keys, scale_log2, tanh_scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    for start in tl.range(begin, end, BLOCK_N):
        k = k_desc.load([batch, kv_head, start, 0]).reshape(BLOCK_N, D)
        v = v_desc.load([batch, kv_head, start, 0]).reshape(BLOCK_N, D)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        key = start + tl.arange(0, BLOCK_N)
        acc, row_max, row_sum = attend_tile(
            acc, row_max, row_sum, q, k, v, query, key, num_keys, scale_log2, tanh_scale, 0, CAUSAL, False, MASKED
        )
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def _flash_tma_kernel(
    q_ptr, k_desc, v_desc, out_ptr, stride_qb, stride_qh, stride_qn,
    num_heads, group, num_queries, num_keys, scale_log2, tanh_scale, sinks_ptr,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    batch_head = tl.program_id(0) // num_tiles
    batch, head = batch_head // num_heads, batch_head % num_heads
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, D)
    there = (row < num_queries)[:, None]
    q_ptr += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q = tl.load(q_ptr + row.to(tl.int64)[:, None] * stride_qn + dim[None, :], mask=there, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    query = num_keys - num_queries + row
    first = num_keys - num_queries + tile * BLOCK_M
    last = num_keys - num_queries + tl.minimum(tile * BLOCK_M + BLOCK_M, num_queries) - 1
    _, full_begin, full_end, end = seen_by_tile(first, last, num_keys, 0, CAUSAL, False, BLOCK_N)

    acc = tl.zeros([BLOCK_M, D], tl.float32)
    row_max, row_sum = start_softmax(sinks_ptr, head, BLOCK_M)
    acc, row_max, row_sum = _attend_described(
        acc, row_max, row_sum, q, k_desc, v_desc, batch, head // group, full_begin, full_end, query,
        num_keys, scale_log2, tanh_scale, CAUSAL, False, D, BLOCK_N, WIDEN,
    )  # fmt: skip
    acc, row_max, row_sum = _attend_described(
        acc, row_max, row_sum, q, k_desc, v_desc, batch, head // group, full_end, end, query,
        num_keys, scale_log2, tanh_scale, CAUSAL, True, D, BLOCK_N, WIDEN,
    )  # fmt: skip
    out, _ = finish_softmax(acc, row_max, row_sum)
    place = out_ptr + (batch_head.to(tl.int64) * num_queries + row)[:, None] * D + dim[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=there)
