"""Wrong answers to the exercises of chapter 05."""

from __future__ import annotations

from planted import wrong
from solutions.ch05 import serve_timed


@wrong("serve_timed", "its wait belongs to its TTFT")
def starts_the_clock_when_it_starts_to_work(decoder, prompts, max_tokens, clock):
    served = [serve_timed(decoder, [prompt], max_tokens, clock) for prompt in prompts]
    return [clocks for (clocks,), _ in served], 0.0


@wrong("serve_timed", "subtract the arrival")
def reports_the_time_of_day(decoder, prompts, max_tokens, clock):
    arrived_s = clock()
    clocks, rate = serve_timed(decoder, prompts, max_tokens, clock)
    return [(arrived_s + ttft, tpot) for ttft, tpot in clocks], rate


@wrong("serve_timed", "4 tokens have 3 gaps")
def divides_by_the_tokens(decoder, prompts, max_tokens, clock):
    clocks, rate = serve_timed(decoder, prompts, max_tokens, clock)
    return [(ttft, tpot * (max_tokens - 1) / max_tokens) for ttft, tpot in clocks], rate


@wrong("serve_timed", "counts the tokens of all requests")
def counts_the_tokens_of_one(decoder, prompts, max_tokens, clock):
    clocks, rate = serve_timed(decoder, prompts, max_tokens, clock)
    return clocks, rate / len(prompts)


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


@wrong("largest_batch", "tpot_s is ignored")
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
