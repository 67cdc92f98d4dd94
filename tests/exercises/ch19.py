"""Wrong answers to the exercises of chapter 19."""

from __future__ import annotations

import math
from statistics import mean

from planted import wrong
from solutions import ch19


@wrong("blocks_left", "the share is of the whole memory")
def shares_what_is_left(memory_bytes, utilization, weight_bytes, other_bytes, kv_bytes_per_token, block_size, cards):
    left = utilization * (memory_bytes - weight_bytes / cards - other_bytes)
    return max(0, int(left // (block_size * kv_bytes_per_token / cards)))


@wrong("blocks_left", "a part of every token's keys and values")
def keeps_whole_tokens(memory_bytes, utilization, weight_bytes, other_bytes, kv_bytes_per_token, block_size, cards):
    left = memory_bytes * utilization - weight_bytes / cards - other_bytes
    return max(0, int(left // (block_size * kv_bytes_per_token)))


@wrong("blocks_left", "there are 0 blocks, not -")
def goes_below_nothing(memory_bytes, utilization, weight_bytes, other_bytes, kv_bytes_per_token, block_size, cards):
    left = memory_bytes * utilization - weight_bytes / cards - other_bytes
    return int(left // (block_size * kv_bytes_per_token / cards))


@wrong("step_line", "not 1 / rate")
def takes_a_token_for_a_step(clients, tokens_per_s):
    times = [1 / rate for rate in tokens_per_s]
    slope = sum((x - mean(clients)) * y for x, y in zip(clients, times, strict=True))
    slope /= sum((x - mean(clients)) ** 2 for x in clients)
    return mean(times) - slope * mean(clients), slope


@wrong("step_line", "through the first and the last point")
def joins_the_ends(clients, tokens_per_s):
    times = [number / rate for number, rate in zip(clients, tokens_per_s, strict=True)]
    slope = (times[-1] - times[0]) / (clients[-1] - clients[0])
    return times[0] - slope * clients[0], slope


@wrong("step_line", "exchanged")
def gives_the_slope_first(clients, tokens_per_s):
    return ch19.step_line(clients, tokens_per_s)[::-1]


@wrong("capacity", "it is broken")
def gives_what_broke_it(kept, low, high):
    while high - low > 0.005 * low:
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) else (low, middle)
    return high


@wrong("capacity", "even low breaks it")
def trusts_low(kept, low, high):
    return ch19.capacity(lambda rate: rate == low or kept(rate), low, high)


@wrong("capacity", "less than 20")
def climbs(kept, low, high):
    rate = low
    while 1.1 * rate <= high and kept(1.1 * rate):
        rate *= 1.1
    return ch19.capacity(kept, rate, min(high, 1.1 * rate))


@wrong("cost_per_million", "must carry the peak")
def buys_for_the_average(requests_per_s, tokens, peak, carried_per_s, price_per_hour):
    cards = math.ceil(requests_per_s / carried_per_s)
    return 1e6 * cards * price_per_hour / (3600 * requests_per_s * tokens)


@wrong("cost_per_million", "cards are whole")
def buys_parts_of_cards(requests_per_s, tokens, peak, carried_per_s, price_per_hour):
    cards = requests_per_s * peak / carried_per_s
    return 1e6 * cards * price_per_hour / (3600 * requests_per_s * tokens)


@wrong("cost_per_million", "not of the peak")
def sells_the_peak(requests_per_s, tokens, peak, carried_per_s, price_per_hour):
    return ch19.cost_per_million(requests_per_s, tokens, peak, carried_per_s, price_per_hour) / peak
