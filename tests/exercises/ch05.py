"""Wrong answers to the exercises of chapter 05."""

from __future__ import annotations

from planted import wrong


@wrong("throughput", "rates of the requests are added up")
def adds_rates_up(requests):
    return sum(len(times) / (times[-1] - at) for at, times in requests)


@wrong("throughput", "mean rate of a request")
def takes_the_mean_rate(requests):
    return sum(len(times) / (times[-1] - at) for at, times in requests) / len(requests)


@wrong("throughput", "the clock starts at 0")
def starts_at_zero(requests):
    return sum(len(times) for _, times in requests) / max(times[-1] for _, times in requests)


@wrong("throughput", "need not be first or last in the list")
def takes_the_list_for_the_order(requests):
    return sum(len(times) for _, times in requests) / (requests[-1][1][-1] - requests[0][0])


@wrong("step_floor_s", "and the longer one counts")
def adds_both_up(pieces, parameters, weight_bytes, kv_token_bytes, bandwidth, peak):
    num_bytes = weight_bytes + kv_token_bytes * sum(before for before, _ in pieces)
    return num_bytes / bandwidth + 2 * parameters * sum(tokens for _, tokens in pieces) / peak


@wrong("step_floor_s", "a step reads them once")
def reads_the_weights_for_each(pieces, parameters, weight_bytes, kv_token_bytes, bandwidth, peak):
    num_bytes = sum(weight_bytes + kv_token_bytes * before for before, _ in pieces)
    return max(num_bytes / bandwidth, 2 * parameters * sum(tokens for _, tokens in pieces) / peak)


@wrong("step_floor_s", "a multiply-add is two operations")
def counts_a_multiply_add_once(pieces, parameters, weight_bytes, kv_token_bytes, bandwidth, peak):
    num_bytes = weight_bytes + kv_token_bytes * sum(before for before, _ in pieces)
    return max(num_bytes / bandwidth, parameters * sum(tokens for _, tokens in pieces) / peak)


@wrong("largest_batch", "the weights need memory, too")
def forgets_the_weights(memory_bytes, weight_bytes, kv_token_bytes, context, bandwidth, tpot_s):
    cache = kv_token_bytes * context
    return int(min(memory_bytes // cache, (bandwidth * tpot_s - weight_bytes) // cache))


@wrong("largest_batch", "TPOT is not asked")
def asks_memory_alone(memory_bytes, weight_bytes, kv_token_bytes, context, bandwidth, tpot_s):
    return int((memory_bytes - weight_bytes) // (kv_token_bytes * context))


@wrong("largest_batch", "not even the weights fit, the answer is 0")
def serves_less_than_nobody(memory_bytes, weight_bytes, kv_token_bytes, context, bandwidth, tpot_s):
    return int((min(memory_bytes, bandwidth * tpot_s) - weight_bytes) // (kv_token_bytes * context))


@wrong("honest_tpot", "gaps, not tokens")
def counts_tokens(reported_tpot_s, num_tokens, num_hidden):
    return reported_tpot_s * num_tokens / (num_tokens - num_hidden)


@wrong("honest_tpot", "the wrong way round")
def turns_it_round(reported_tpot_s, num_tokens, num_hidden):
    return reported_tpot_s * (num_tokens - 1 - num_hidden) / (num_tokens - 1)


@wrong("honest_tpot", "there is no gap")
def divides_by_nothing(reported_tpot_s, num_tokens, num_hidden):
    return reported_tpot_s * (num_tokens - 1) / (num_tokens - 1 - num_hidden)
