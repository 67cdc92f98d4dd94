"""Solutions to the exercises of chapter 19, predict the server before you rent it."""

from __future__ import annotations

import math
from statistics import mean


def blocks_left(memory_bytes, utilization, weight_bytes, other_bytes, kv_bytes_per_token, block_size, cards):
    """What is left of one card's budget, in whole blocks of its part of the keys and values."""
    left = memory_bytes * utilization - weight_bytes / cards - other_bytes
    return max(0, int(left // (block_size * kv_bytes_per_token / cards)))


def step_line(clients, tokens_per_s):
    """Least squares over the times of a step."""
    times = [number / rate for number, rate in zip(clients, tokens_per_s, strict=True)]
    middle, middle_s = mean(clients), mean(times)
    covariance = sum((x - middle) * (y - middle_s) for x, y in zip(clients, times, strict=True))
    slope = covariance / sum((x - middle) ** 2 for x in clients)
    return middle_s - slope * middle, slope


def capacity(kept, low, high):
    """Bisection between a rate that is good and one that is not."""
    if not kept(low):
        return 0
    if kept(high):
        return high
    good, bad = low, high
    while bad > 1.01 * good:
        middle = (good + bad) / 2
        good, bad = (middle, bad) if kept(middle) else (good, middle)
    return good


def cost_per_million(requests_per_s, tokens, peak, carried_per_s, price_per_hour):
    """Whole cards for the peak, over the tokens of the average."""
    cards = math.ceil(requests_per_s * peak / carried_per_s)
    return 1e6 * cards * price_per_hour / (3600 * requests_per_s * tokens)
