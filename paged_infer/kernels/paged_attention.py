"""Attention that reads keys and values through block tables."""

from __future__ import annotations

import torch
from torch import Tensor

from paged_infer.kernels.reference import dense_attention


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention of packed queries over paged keys and values, one sequence after the other.

    q [T, H, D]; caches [num_blocks, block_size, H_kv, D]; block_tables [B, max_blocks], seq_lens [B] and
    query_start_loc [B + 1] int32 -> [T, H, D]. The queries of a sequence are the last of its ``seq_lens`` tokens. A
    ``window`` counts the token itself. Slots past a sequence's end and surplus table entries may hold anything, NaN
    included: they are never read (PagedAttention, Kwon 2023, equation 4).
    """
    block_size = k_cache.shape[1]
    out = torch.zeros_like(q)
    bounds = query_start_loc.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        queries = slice(bounds[row], bounds[row + 1])
        if queries.start == queries.stop:
            continue
        token = torch.arange(length, device=q.device)
        slots = block_tables[row, token // block_size].long() * block_size + token % block_size
        k, v = k_cache.flatten(0, 1)[slots], v_cache.flatten(0, 1)[slots]  # [length, H_kv, D]
        out[queries] = dense_attention(q[queries], k, v, scale=scale, window=window)
    return out
