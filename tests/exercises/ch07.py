"""Wrong answers to the exercises of chapter 07."""

from __future__ import annotations

import torch
from planted import wrong


def _rescaled(left, right):
    row_max = torch.maximum(left[0], right[0])
    return row_max, (left[0] - row_max).exp(), (right[0] - row_max).exp()


@wrong("merge_states", "sums were added as they are")
def adds_sums(left, right):
    row_max, a, b = _rescaled(left, right)
    return row_max, left[1] + right[1], left[2] * a[:, None] + right[2] * b[:, None]


@wrong("merge_states", "outs were added as they are")
def forgets_to_rescale_out(left, right):
    row_max, a, b = _rescaled(left, right)
    return row_max, left[1] * a + right[1] * b, left[2] + right[2]


@wrong("merge_states", "were averaged")
def averages_outputs(left, right):
    row_max, a, b = _rescaled(left, right)
    out = (left[2] / left[1][:, None] + right[2] / right[1][:, None]) / 2
    return row_max, left[1] * a + right[1] * b, out


@wrong("merge_states", "divided by the sum already")
def divides(left, right):
    row_max, a, b = _rescaled(left, right)
    row_sum = left[1] * a + right[1] * b
    return row_max, row_sum, (left[2] * a[:, None] + right[2] * b[:, None]) / row_sum[:, None]


@wrong("merge_states", r"with the left and the right having seen nothing there is NaN")
def subtracts_infinity_from_infinity(left, right):
    row_max, a, b = _rescaled(left, right)
    return row_max, left[1] * a + right[1] * b, left[2] * a[:, None] + right[2] * b[:, None]


def _blocks(N, M, block_q):
    return [M - N + min(start + block_q, N) for start in range(0, N, block_q)]


@wrong("causal_traffic", "the mask hides those after its last query")
def reads_all_keys(N, M, d, block_q):
    return 2 * N * d + 2 * d * M * len(_blocks(N, M, block_q))


@wrong("causal_traffic", "before the first query are seen by all queries")
def forgets_earlier_tokens(N, M, d, block_q):
    return 2 * N * d + 2 * d * sum(_blocks(N, N, block_q))


@wrong("causal_traffic", "sees no key after the last query")
def fills_the_last_block(N, M, d, block_q):
    return 2 * N * d + 2 * d * sum(M - N + start + block_q for start in range(0, N, block_q))


@wrong("causal_traffic", "is not full, but it reads keys, too")
def drops_the_last_block(N, M, d, block_q):
    return 2 * N * d + 2 * d * sum(_blocks(N, M, block_q)[: N // block_q])


@wrong("causal_traffic", "each is d numbers wide")
def counts_keys_once(N, M, d, block_q):
    return 2 * N * d + d * sum(_blocks(N, M, block_q))


@wrong("causal_traffic", "q is read and the output written, too")
def counts_keys_and_values_alone(N, M, d, block_q):
    return 2 * d * sum(_blocks(N, M, block_q))


@wrong("key_tiles", "multiples of 16")
def begins_at_the_first_key(first, last, window, block_k):
    return list(range(max(0, first - window + 1), last + 1, block_k))


@wrong("key_tiles", "looks further back")
def looks_from_the_last_query(first, last, window, block_k):
    return list(range(max(0, last - window + 1) // block_k * block_k, last + 1, block_k))


@wrong("key_tiles", "counts the query itself")
def reaches_one_too_far(first, last, window, block_k):
    return list(range(max(0, first - window) // block_k * block_k, last + 1, block_k))


@wrong("key_tiles", "no key stands before 0")
def begins_before_the_text(first, last, window, block_k):
    return list(range((first - window + 1) // block_k * block_k, last + 1, block_k))


@wrong("key_tiles", "no key after query 15 is seen")
def reads_one_tile_more(first, last, window, block_k):
    return list(range(max(0, first - window + 1) // block_k * block_k, last + block_k + 1, block_k))
