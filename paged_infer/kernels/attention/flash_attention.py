"""FlashAttention forward in Triton: softmax(q k^T / sqrt(d)) v without ever writing the N x M scores to memory.

                      keys  0 ........ M
           tile 0   [ full | full | diag |      |      ]     a program has BLOCK_M queries of one head and iterates
  queries  tile 1   [ full | full | full | diag |      ]     over the keys in tiles of BLOCK_N: first the tiles that
           tile 2   [ full | full | full | full | diag ]     all its queries see, without a mask, then the diagonal

Only one tile of scores exists at a time, in registers. Each row keeps its maximum so far, the sum of its exponentials,
and its output so far; a larger maximum rescales the last two (online softmax, Milakov and Gimelshein 2018;
FlashAttention-2, Dao 2023, algorithm 1): ``attention_tile``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_infer.kernels.attention.attention_tile import (
    attend_tile,
    finish_softmax,
    load_tiles,
    max_registers,
    padded,
    score_factors,
    seen_by_tile,
    start_softmax,
)
from paged_infer.kernels.attention.checks import check_dense_attention
from paged_infer.kernels.attention.flash_tma import flash_attention_tma, why_not_tma
from paged_infer.kernels.attention.tiles import flash_tiles
from paged_infer.kernels.triton_runtime import capability, launch, must_widen, tl, triton


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool = True, scale: float | None = None, window: int | None = None, return_lse: bool = False,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Any:  # fmt: skip
    """Exact attention of dense tensors in float32, float16 or bfloat16, on CUDA (and interpreted on a CPU).

    q [B, H, N, D], k and v [B, H_kv, M, D] -> [B, H, N, D]. H is a multiple of H_kv: each group of query heads reads
    one key head (GQA, Ainslie 2023). D is at most 256. Any strides; a last dimension that is not dense is copied.
    Forward only: no gradient flows back.

    Args:
        causal: queries are the last N of M tokens and see no later token. With N > M the first N - M see no key, and
            their output is zero.
        scale: the factor of the scores, above 0; default 1/sqrt(D).
        window: number of tokens that a query sees, its own included; causal only.
        return_lse: return (out, lse), where lse is log(sum(exp(scores))) of each query: float32 [B, H, N], -inf for a
            query that sees no key.
        softcap: above 0: scaled scores become softcap * tanh(scores / softcap), before the mask (Gemma 2, section 2).
        sinks: [H], a logit of each query head that joins the softmax's sum: a key of that score and of value zero,
            which every query sees (gpt-oss). It counts in lse.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; the message names them.
    """
    check_dense_attention(q, k, v, causal, scale, window, softcap, sinks)
    q, k, v = (_row_major(x) for x in (q, k, v))
    batch, num_heads, num_queries, dim = q.shape
    num_keys = k.shape[2]
    out = _row_major(torch.empty_like(q))
    lse = torch.empty((batch, num_heads, num_queries) if return_lse else 0, device=q.device)
    group = num_heads // k.shape[1]
    tile = flash_tiles(capability(q.device), dim, q.dtype, group, window)
    if tile.use_tma and window is None and not return_lse and not why_not_tma(q, k, v):
        return flash_attention_tma(q, k, v, causal=causal, scale=scale, tile=tile, softcap=softcap, sinks=sinks)
    block_m, block_n, num_warps, num_stages = tile[:4]
    num_tiles = triton.cdiv(num_queries, block_m)
    launch(
        _flash_kernel,
        (num_tiles * batch * num_heads,),
        q, k, v, out, lse,
        *(stride for x in (q, k, v, out) for stride in x.stride()[:2]),
        num_heads, group, num_queries, num_keys,
        *score_factors(dim**-0.5 if scale is None else scale, softcap),
        min(window or 0, num_keys + num_queries),  # a wider window hides nothing, and may not fit 32 bits
        sinks,
        CAUSAL=causal, HAS_WINDOW=window is not None, SAVE_LSE=return_lse,
        STRIDE_Q=q.stride(2), STRIDE_K=k.stride(2), STRIDE_V=v.stride(2), STRIDE_O=out.stride(2),
        ALIGN=common_alignment(q, k, v, out),
        D=dim, BLOCK_D=padded(dim), BLOCK_M=block_m, BLOCK_N=block_n, WIDEN=must_widen(q),
        num_warps=num_warps, num_stages=num_stages, maxnreg=max_registers(q.dtype),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def flash_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool = True, scale: float | None = None, window: int | None = None, return_lse: bool = False,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Any:  # fmt: skip
    """``flash_attention`` in plain torch, with all scores at once and heads of any size."""
    check_dense_attention(q, k, v, causal, scale, window, softcap, sinks, max_head_dim=None)
    seen = causal_mask(q.shape[2], k.shape[2], window, q.device) if causal else None
    out, lse = attend_seen(q, k, v, seen, scale, softcap, None if sinks is None else sinks[:, None, None])
    return (out, lse.float()) if return_lse else out


def attend_seen(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None,
    scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention with any mask in plain torch: (out [B, H, N, D], lse [B, H, N]), computed in float32 at least.

    q [B, H, N, D], k and v [B, H_kv, M, D]. ``seen`` is True where a query sees a key, and broadcast to [B, H, N, M];
    None: everywhere. ``sinks`` is broadcast to [B, H, N, 1].
    """
    weights, lse = _weights(q, k, seen, scale, softcap, sinks)
    v_ = v.to(weights.dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)  # [B, H, M, D]
    if sinks is not None:
        v_ = F.pad(v_, (0, 0, 0, 1))
    return (weights @ v_).to(q.dtype), lse


def _weights(
    q: Tensor, k: Tensor, seen: Tensor | None, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of ``attend_seen``: weights [B, H, N, M], with a last column for sinks if there are any; lse [B, H, N]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q_, k_ = q.to(wide), k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)  # [B, H, N or M, D]
    scores = q_ @ k_.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)  # [B, H, N, M]
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:  # one more key, of that score and of value zero
        scores = torch.cat((scores, sinks.to(wide).expand(*scores.shape[:3], 1)), -1)
    lse = scores.logsumexp(-1)  # [B, H, N]
    return scores.softmax(-1).masked_fill((lse == -math.inf)[..., None], 0.0), lse


def attention_weights(
    q: Tensor, k: Tensor, *, window: int | None = None,
    scale: float | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What attention multiplies the values by: q [N, H, D], the last N of M tokens, k [M, H_kv, D] -> [H, N, M].

    In plain torch, in float32 at least; for readers and experiments. Arguments as in ``flash_attention``. A row's sum
    is 1, or less with ``sinks``, whose own weight is left out.
    """
    seen = causal_mask(len(q), len(k), window, q.device)
    rows = None if sinks is None else sinks[:, None, None]
    weights, _ = _weights(q.transpose(0, 1)[None], k.transpose(0, 1)[None], seen, scale, softcap, rows)
    return weights[0, ..., : len(k)]


def causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query sees a key: [N, M]. Queries are the last N of M tokens; a window counts the token itself."""
    key = torch.arange(num_keys, device=device)
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _row_major(x: Tensor) -> Tensor:
    """x [B, heads, N, D] with dense rows, and a row stride with which 32 bits address a tile (of at most 128 rows)."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 2**24 else x.contiguous()


def common_alignment(*tensors: Tensor) -> int:
    """The largest power of two, at most 16, that divides all strides but the last: the width of a load."""
    return math.gcd(16, *(stride for x in tensors for stride in x.stride()[:-1]))


@triton.jit
def _attend_keys(
    acc, row_max, row_sum, q, k_ptr, v_ptr, begin, end, query, num_keys, scale_log2, tanh_scale, window,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr,
    STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Attend to keys begin..end (``begin`` is a tile edge). All rows see all of them unless MASKED."""
    dim = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_N)
    k_offsets = column[:, None] * STRIDE_K + dim[None, :]
    v_offsets = column[:, None] * STRIDE_V + dim[None, :]
    for start in tl.range(begin, end, BLOCK_N):
        key = start + column  # [N]
        # A head may have more than 2^31 elements; a tile has not (_row_major).
        place = tl.cast(start, tl.int64)
        k, v = load_tiles(
            k_ptr + place * STRIDE_K + k_offsets, v_ptr + place * STRIDE_V + v_offsets,
            key < num_keys, dim, D, BLOCK_D, MASKED, WIDEN,
        )  # fmt: skip
        acc, row_max, row_sum = attend_tile(
            acc, row_max, row_sum, q, k, v, query, key, num_keys, scale_log2, tanh_scale, window,
            CAUSAL, HAS_WINDOW, MASKED,
        )  # fmt: skip
    return acc, row_max, row_sum


# Lengths differ between calls; specialising on whether 16 divides them would only compile the kernel again.
@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def _flash_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_ob, stride_oh,
    num_heads, group, num_queries, num_keys, scale_log2, tanh_scale, window, sinks_ptr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, SAVE_LSE: tl.constexpr,
    STRIDE_Q: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr, STRIDE_O: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # One program: a tile of queries of one head. The last tiles see the most keys, so they start first.
    num_tiles = tl.cdiv(num_queries, BLOCK_M)
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    batch_head = tl.program_id(0) // num_tiles
    batch, head = (batch_head // num_heads).to(tl.int64), (batch_head % num_heads).to(tl.int64)
    q_ptr += tl.multiple_of(batch * stride_qb + head * stride_qh, ALIGN)
    k_ptr += tl.multiple_of(batch * stride_kb + head // group * stride_kh, ALIGN)
    v_ptr += tl.multiple_of(batch * stride_vb + head // group * stride_vh, ALIGN)
    out_ptr += tl.multiple_of(batch * stride_ob + head * stride_oh, ALIGN)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [M] of this head's queries
    dim = tl.arange(0, BLOCK_D)
    there = (row < num_queries)[:, None] & (dim < D)[None, :]
    q = tl.load(q_ptr + row.to(tl.int64)[:, None] * STRIDE_Q + dim[None, :], mask=there, other=0.0)  # [M, D]
    if WIDEN:
        q = q.to(tl.float32)
    query = num_keys - num_queries + row  # positions: the queries are the last tokens
    first = num_keys - num_queries + tile * BLOCK_M
    last = num_keys - num_queries + tl.minimum(tile * BLOCK_M + BLOCK_M, num_queries) - 1
    begin, full_begin, full_end, end = seen_by_tile(first, last, num_keys, window, CAUSAL, HAS_WINDOW, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max, row_sum = start_softmax(sinks_ptr, head, BLOCK_M)
    if HAS_WINDOW:
        acc, row_max, row_sum = _attend_keys(
            acc, row_max, row_sum, q, k_ptr, v_ptr, begin, full_begin, query, num_keys,
            scale_log2, tanh_scale, window, CAUSAL, HAS_WINDOW, True, STRIDE_K, STRIDE_V, D, BLOCK_D, BLOCK_N, WIDEN,
        )  # fmt: skip
    acc, row_max, row_sum = _attend_keys(
        acc, row_max, row_sum, q, k_ptr, v_ptr, full_begin, full_end, query, num_keys,
        scale_log2, tanh_scale, window, CAUSAL, HAS_WINDOW, False, STRIDE_K, STRIDE_V, D, BLOCK_D, BLOCK_N, WIDEN,
    )  # fmt: skip
    acc, row_max, row_sum = _attend_keys(
        acc, row_max, row_sum, q, k_ptr, v_ptr, full_end, end, query, num_keys,
        scale_log2, tanh_scale, window, CAUSAL, HAS_WINDOW, True, STRIDE_K, STRIDE_V, D, BLOCK_D, BLOCK_N, WIDEN,
    )  # fmt: skip

    out, lse = finish_softmax(acc, row_max, row_sum)
    place = out_ptr + row.to(tl.int64)[:, None] * STRIDE_O + dim[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=there)
    if SAVE_LSE:
        lse_row = lse_ptr + batch_head.to(tl.int64) * num_queries + row
        tl.store(lse_row, lse, mask=row < num_queries)
