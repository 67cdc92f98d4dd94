"""Wrong answers to the exercises of chapter 07."""

from __future__ import annotations

import torch
from planted import wrong

from paged_infer.kernels.triton_runtime import launch, tl, triton


def _shrinks(left, right):
    peak = torch.maximum(left[0], right[0])
    return peak, (left[0] - peak).exp(), (right[0] - peak).exp()


@wrong("merge_states", "totals were added as they are")
def adds_totals(left, right):
    peak, a, b = _shrinks(left, right)
    return peak, left[1] + right[1], left[2] * a[:, None] + right[2] * b[:, None]


@wrong("merge_states", "outs were added as they are")
def forgets_to_shrink_out(left, right):
    peak, a, b = _shrinks(left, right)
    return peak, left[1] * a + right[1] * b, left[2] + right[2]


@wrong("merge_states", "were averaged")
def averages_outputs(left, right):
    peak, a, b = _shrinks(left, right)
    out = (left[2] / left[1][:, None] + right[2] / right[1][:, None]) / 2
    return peak, left[1] * a + right[1] * b, out


@wrong("merge_states", "divided by the total already")
def divides(left, right):
    peak, a, b = _shrinks(left, right)
    total = left[1] * a + right[1] * b
    return peak, total, (left[2] * a[:, None] + right[2] * b[:, None]) / total[:, None]


@wrong("merge_states", r"with the left and the right having seen nothing there is NaN")
def subtracts_infinity_from_infinity(left, right):
    peak, a, b = _shrinks(left, right)
    return peak, left[1] * a + right[1] * b, left[2] * a[:, None] + right[2] * b[:, None]


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


@triton.jit
def _careless_kernel(x_ptr, out_ptr, width, OTHER: tl.constexpr, SAFE: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    place = tl.program_id(0) * width + column
    x = tl.load(x_ptr + place, mask=column < width, other=OTHER)
    weights = tl.exp(x - tl.max(x, 0)) if SAFE else tl.exp(x)
    tl.store(out_ptr + place, weights / tl.sum(weights, 0), mask=column < width)


def _careless(x, other, safe):
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    launch(_careless_kernel, (x.shape[0],), x, out, x.shape[1], OTHER=other, SAFE=safe, BLOCK=block)
    return out


@wrong("row_softmax", "masked columns were read as 0")
def reads_masked_columns_as_zero(x):
    return _careless(x, 0.0, True)


@wrong("row_softmax", "subtract the row's peak")
def overflows(x):
    return _careless(x, float("-inf"), False)


@wrong("row_softmax", "columns add up to 1")
def sums_the_columns(x):
    return x.softmax(dim=0)


@wrong("row_softmax", "None: is the `return` missing")
def forgets_to_return_the_output(x):
    _careless(x, float("-inf"), True)
