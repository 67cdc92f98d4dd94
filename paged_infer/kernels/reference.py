"""Attention in plain torch: slow, short, and what every other version is held to.

N queries are the last N of M tokens, so the causal diagonal is aligned to the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query sees a key: [N, M]. A window counts the query's own token."""
    key = torch.arange(num_keys, device=device)
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None
) -> Tensor:
    """softmax(q k^T * scale) v for one sequence, causal, each group of query heads reading one key head.

    q [N, H, D], k and v [M, H_kv, D] -> [N, H, D]. Scores and sums are float32 at least (Vaswani 2017, 3.2.1;
    GQA: Ainslie 2023). ``scale`` is 1/sqrt(D) unless given.
    """
    group = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_ = (x.transpose(0, 1).to(wide) for x in (q, k, v))  # [heads, N or M, D]
    scores = q_ @ k_.repeat_interleave(group, 0).transpose(1, 2)  # [H, N, M]
    scores = scores * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = scores.masked_fill(~causal_mask(q.shape[0], k.shape[0], window, q.device), -math.inf)
    return (scores.softmax(-1) @ v_.repeat_interleave(group, 0)).transpose(0, 1).to(q.dtype)
