"""Solutions to the exercises of chapter 05, prefill, decode and the roofline."""

from __future__ import annotations

from my_engine.cache import ContiguousCache


def serve_timed(decoder, prompts, max_tokens, clock):
    """One arrival for all; of each prompt the time of every token."""
    arrived_s, times = clock(), []
    for prompt in prompts:
        token_ids, token_s = list(prompt), []
        cache = ContiguousCache(decoder, len(prompt) + max_tokens)
        while len(token_s) < max_tokens:
            end = len(token_ids)
            hidden = decoder(token_ids[cache.start :], range(cache.start, end), cache)
            cache.start = end
            token_ids.append(decoder.logits(hidden[-1]).argmax().item())
            token_s.append(clock())
        times.append(token_s)
    each = [(token_s[0] - arrived_s, (token_s[-1] - token_s[0]) / (len(token_s) - 1)) for token_s in times]
    return each, sum(map(len, times)) / (times[-1][-1] - arrived_s)


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
