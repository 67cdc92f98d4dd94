"""Solutions of chapter 07, FlashAttention."""

from __future__ import annotations

import math

import torch

from paged_infer.kernels.triton_runtime import launch, tl, triton


def merge_states(left, right):
    """Both shrink to the larger peak; where neither has seen a key there is nothing to subtract."""
    peak = torch.maximum(left[0], right[0])  # [n]
    shift = torch.where(peak == -math.inf, 0.0, peak)
    a, b = (left[0] - shift).exp(), (right[0] - shift).exp()
    return peak, left[1] * a + right[1] * b, left[2] * a[:, None] + right[2] * b[:, None]


def causal_traffic(N, M, d, block_q):
    """A block reads the keys and values up to its last query; q is read once, and the output written once."""
    ends = [min(start + block_q, N) for start in range(0, N, block_q)]
    return 2 * N * d + sum(2 * d * (M - N + end) for end in ends)


def key_tiles(first, last, window, block_k):
    """The first query looks back furthest, the last one stands furthest on."""
    begin = max(0, first - window + 1) // block_k * block_k
    return list(range(begin, last + 1, block_k))


@triton.jit
def _softmax_kernel(x_ptr, out_ptr, width, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    place = tl.program_id(0) * width + column
    x = tl.load(x_ptr + place, mask=column < width, other=float("-inf"))
    weights = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + place, weights / tl.sum(weights, 0), mask=column < width)


def row_softmax(x):
    """Masked columns read as -inf: they win no maximum, and their exponential adds 0."""
    out = torch.empty_like(x)
    launch(_softmax_kernel, (x.shape[0],), x, out, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return out
