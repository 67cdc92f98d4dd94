"""Solutions to the exercises of chapter 05, prefill, decode and the roofline."""

from __future__ import annotations


def throughput(requests):
    """All tokens, over the time from the first arrival to the last token of anybody."""
    began_s, ended_s = min(at for at, _ in requests), max(times[-1] for _, times in requests)
    return sum(len(times) for _, times in requests) / (ended_s - began_s)


def step_floor_s(pieces, parameters, weight_bytes, kv_token_bytes, bandwidth, peak):
    """Weights once and every cache, over the bandwidth; two operations a parameter and token, over the peak."""
    num_bytes = weight_bytes + kv_token_bytes * sum(before for before, _ in pieces)
    flops = 2 * parameters * sum(tokens for _, tokens in pieces)
    return max(num_bytes / bandwidth, flops / peak)


def largest_batch(memory_bytes, weight_bytes, kv_token_bytes, context, bandwidth, tpot_s):
    """Bytes that may be held and bytes that may be read: the smaller of both, less the weights, in whole caches."""
    room = min(memory_bytes, bandwidth * tpot_s) - weight_bytes
    return max(0, int(room // (kv_token_bytes * context)))


def honest_tpot(reported_tpot_s, num_tokens, num_hidden):
    """The reported one times its divisor is the time that was seen; divide that by the gaps that were."""
    visible_gaps = num_tokens - 1 - num_hidden
    return reported_tpot_s * (num_tokens - 1) / visible_gaps if visible_gaps > 0 else None
