"""Solutions of chapter 07, FlashAttention."""

from __future__ import annotations

import math

import torch


def merge_states(left, right):
    """Both are rescaled to the larger maximum; where neither has seen a key there is nothing to subtract."""
    row_max = torch.maximum(left[0], right[0])  # [n]
    shift = torch.where(row_max == -math.inf, 0.0, row_max)
    a, b = (left[0] - shift).exp(), (right[0] - shift).exp()
    return row_max, left[1] * a + right[1] * b, left[2] * a[:, None] + right[2] * b[:, None]


def causal_traffic(N, M, d, block_q):
    """A block reads the keys and values up to its last query; q is read once, and the output written once."""
    ends = [min(start + block_q, N) for start in range(0, N, block_q)]
    return 2 * N * d + sum(2 * d * (M - N + end) for end in ends)


def key_tiles(first, last, window, block_k):
    """The first query looks back furthest, the last one stands furthest on."""
    begin = max(0, first - window + 1) // block_k * block_k
    return list(range(begin, last + 1, block_k))
