"""Paged attention on a CPU without a gather: decodes read keys and values in place, in ``kernels.c``.

Torch's batched products need contiguous keys, so ``paged_sdpa`` copies every key and value of the batch in every layer
of every step, and pads rows to the longest. Here each (sequence, key head) follows its own block table, with the online
softmax of the Triton kernels. A few tokens of one sequence, such as drafts, are computed the same way: each is a query
of its own, over the keys that it sees. Prompt chunks, for which the products are worth the copy, go to ``paged_sdpa``.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from paged_infer.kernels.attention.metadata import AttentionMetadata, ScoreOptions
from paged_infer.kernels.attention.paged_sdpa import attend_chunks, latent_decode_batched, paged_attention_batched
from paged_infer.kernels.cpu.build import library
from paged_infer.kernels.cpu.ops import suits

_MAX_GROUP_WIDTH = 4096  # MAX_TASK_WIDTH of kernels.c
_FEW = 8  # tokens of a sequence in a step; more are a prompt chunk


def paged_attention_c(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionMetadata, *, window: int | None,
    **scores: Unpack[ScoreOptions],
) -> Tensor:  # fmt: skip
    """q [T, H, D]; caches [num_blocks, block_size, H_kv, D], contiguous -> [T, H, D]."""
    num_heads, dim = q.shape[1:]
    _, block_size, num_kv_heads, _ = k_cache.shape
    dense = suits(q, k_cache, v_cache) and q.stride(1) == dim and k_cache.is_contiguous() and v_cache.is_contiguous()
    if (
        not dense
        or v_cache.shape != k_cache.shape
        or num_heads // num_kv_heads * dim > _MAX_GROUP_WIDTH
        or step.block_tables.stride(-1) != 1
    ):
        return paged_attention_batched(q, k_cache, v_cache, step, window=window, **scores)
    out = torch.empty(q.shape, dtype=q.dtype)
    num_rows, tables, lengths = _rows(step)
    if num_rows:
        scale, sinks = scores.get("scale"), scores.get("sinks")
        sinks = None if sinks is None else sinks.float().contiguous()
        library(q.dtype).paged_decode(
            out.data_ptr(), q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), tables.data_ptr(), lengths.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            num_rows, num_heads, num_kv_heads, dim, block_size, tables.stride(0), q.stride(0),
            2**62 if window is None else window, dim**-0.5 if scale is None else scale, scores.get("softcap") or 0.0,
            torch.get_num_threads(),
        )  # fmt: skip
    if num_rows < q.shape[0]:
        attend_chunks(out, q, k_cache, v_cache, step, window, **scores)
    return out


def _rows(step: AttentionMetadata) -> tuple[int, Tensor, Tensor]:
    """The number of leading queries that C computes, and for each its block table and number of keys, int32."""
    if step.max_query_len > _FEW or step.max_query_len == 1:
        return step.num_decodes, step.block_tables, step.seq_lens
    if "rows" not in step.plan:
        starts, query_lens = step.query_start_loc[:-1], step.query_start_loc.diff()  # [B] each
        owners = torch.arange(len(query_lens)).repeat_interleave(query_lens)  # [T] the sequence of each token
        offsets = torch.arange(len(owners)) - starts[owners]  # [T] among the tokens of its sequence in this step
        seen = (step.seq_lens - query_lens)[owners] + offsets + 1
        step.plan["rows"] = (step.block_tables[owners], seen.int())
    tables, lengths = step.plan["rows"]
    return len(lengths), tables, lengths


def latent_decode_c(q: Tensor, cache: Tensor, step: AttentionMetadata, *, v_dim: int, scale: float) -> Tensor:
    """``kernels.attention.mla.LatentDecode``: q [B, H, Dk], cache [num_blocks, block_size, 1, Dk] -> [B, H, Dv]."""
    num_rows, num_heads, dim = q.shape
    tables, lengths, q = step.block_tables, step.seq_lens, q.contiguous()
    dense = suits(q, cache) and cache.is_contiguous() and tables.stride(-1) == 1
    if not dense or dim > _MAX_GROUP_WIDTH:
        return latent_decode_batched(q, cache, step, v_dim=v_dim, scale=scale)
    out = torch.empty(num_rows, num_heads, v_dim, dtype=q.dtype)
    library(q.dtype).latent_decode(
        out.data_ptr(), q.data_ptr(), cache.data_ptr(), tables.data_ptr(), lengths.data_ptr(),
        num_rows, num_heads, dim, v_dim, cache.shape[1], tables.stride(0), scale, torch.get_num_threads(),
    )  # fmt: skip
    return out
