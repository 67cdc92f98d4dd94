"""Attention that reads keys and values through block tables (PagedAttention, Kwon 2023, section 4.1).

    packed queries [T, H, D]      row 0   row 1   row 2                    rows with one query first
                                  [ q ]   [ q ]   [ q q q q q ]            (AttentionMetadata.num_decodes = 2)
                                    \\       /           |
    two kernels                   paged_decode     paged_prefill

A decode multiplies each key that it reads with one query per head, a prompt chunk with hundreds: decodes are bound by
memory, prefills by arithmetic. One kernel for both would need the prefill's registers in every decode (196 instead of
72 per thread, compiled for sm80), so there are two. Their module docstrings explain their design.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from paged_infer.kernels.attention.checks import check_index_values, check_paged_attention
from paged_infer.kernels.attention.flash_attention import flash_attention_reference
from paged_infer.kernels.attention.paged_decode import paged_decode
from paged_infer.kernels.attention.paged_prefill import paged_prefill
from paged_infer.kernels.kv_quant import dequantise_kv


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *,
    block_tables: Tensor, seq_lens: Tensor, query_start_loc: Tensor,
    scale: float | None = None, window: int | None = None,
    num_decodes: int | None = None, max_query_len: int | None = None, max_seq_len: int | None = None,
    out: Tensor | None = None, return_lse: bool = False, shared: dict[Any, Any] | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Any:  # fmt: skip
    """Causal attention of packed queries over paged keys and values, in Triton: one kernel for decodes, one for chunks.

    q [T, H, D]; caches [num_blocks, block_size, H_kv, D]; block_tables [B, max_blocks], seq_lens [B] and
    query_start_loc [B + 1] int32 -> [T, H, D]. The queries of a sequence are the last of its ``seq_lens`` tokens. Slots
    past the end of a sequence and surplus table entries may hold anything, NaN included: they are never read. The
    output of a row of length 0 is zero, so a batch can be padded to a fixed size.

    Args:
        scale: the factor of the scores, above 0; default 1/sqrt(D).
        window: number of tokens that a query sees, its own included.
        num_decodes: number of leading rows, each with at most one query. This and the next two are hints. With both
            ``num_decodes`` and ``max_query_len``, the host neither reads nor checks values of the index tensors, and a
            CUDA graph can capture the call, as long as lengths stay within the hints.
        max_query_len: upper bound of the queries of a row; further ones are not computed.
        max_seq_len: upper bound of the tokens of a row; default: the capacity of the tables.
        out: the tensor to write to, [T, H, D] with dense rows.
        return_lse: return (out, lse), where lse is log(sum(exp(scores))) of each query: float32 [T, H], -inf for a
            query that sees no key.
        shared: a dict for what calls with the same index tensors and hints have in common, such as those of all
            layers of a step: the splits of decodes.
        softcap, sinks: as in ``flash_attention``; sinks is [H], one logit per query head.
        k_scale, v_scale: scales of quantised caches (``kernels.kv_quant``), [num_blocks, block_size, H_kv] float16.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or (without hints) an index is out of range.
    """
    check_paged_attention(
        q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, scale, window, out, softcap, sinks, k_scale,
        v_scale,
    )  # fmt: skip
    if num_decodes is None or max_query_len is None:
        bounds = query_start_loc.tolist()
        check_index_values(block_tables, seq_lens.tolist(), bounds, q.shape[0], k_cache)
        query_lens = [end - begin for begin, end in pairwise(bounds)]
        num_decodes = next((row for row, n in enumerate(query_lens) if n > 1), len(query_lens))
        max_query_len = max(query_lens, default=0)
    elif not 0 <= num_decodes <= seq_lens.shape[0] or max_query_len < 0:
        raise ValueError(
            f"num_decodes={num_decodes} must be within 0..{seq_lens.shape[0]} rows, and max_query_len={max_query_len} "
            "must be at least 0"
        )
    if max_seq_len is None:
        max_seq_len = block_tables.shape[1] * k_cache.shape[1]
    q = q if q.stride(2) == 1 else q.contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    lse = torch.empty(q.shape[:2] if return_lse else (0, 0), dtype=torch.float32, device=q.device)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    window = None if window is None else min(window, 2**30)  # a wider one hides nothing, and may overflow 32 bits
    given = (q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, out, lse, scale, window, num_decodes)
    paged_decode(*given, max_seq_len, {} if shared is None else shared, softcap, sinks, k_scale, v_scale)
    paged_prefill(*given, max_query_len, softcap, sinks, k_scale, v_scale)
    return (out, lse) if return_lse else out


def paged_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *,
    block_tables: Tensor, seq_lens: Tensor, query_start_loc: Tensor,
    scale: float | None = None, window: int | None = None, return_lse: bool = False,
    softcap: float | None = None, sinks: Tensor | None = None, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Any:  # fmt: skip
    """``paged_attention`` in plain torch, one sequence at a time, without hints."""
    block_size = k_cache.shape[1]
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    bounds = query_start_loc.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        queries = slice(bounds[row], bounds[row + 1])
        if queries.start == queries.stop:
            continue
        token = torch.arange(length, device=q.device)
        slots = block_tables[row, token // block_size].long() * block_size + token % block_size
        k, v = (
            read_slots(*both, slots).transpose(0, 1)[None] for both in ((k_cache, k_scale), (v_cache, v_scale))
        )  # [1, H_kv, length, D]
        dense, dense_lse = flash_attention_reference(
            q[queries].transpose(0, 1)[None].to(k.dtype), k, v,
            scale=scale, window=window, return_lse=True, softcap=softcap, sinks=sinks,
        )  # fmt: skip
        out[queries], lse[queries] = dense[0].transpose(0, 1), dense_lse[0].T
    return (out, lse) if return_lse else out


def read_slots(cache: Tensor, scale: Tensor | None, slots: Tensor) -> Tensor:
    """The keys or values in ``slots`` [S]: [S, H_kv, D], as stored or, with a ``scale``, dequantised to float32."""
    stored = cache.flatten(0, 1)[slots]
    return stored if scale is None else dequantise_kv(stored, scale.flatten(0, 1)[slots])
