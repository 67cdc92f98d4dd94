"""Checkers of chapter 19, predict the server before you rent it."""

from __future__ import annotations

import math

from checks import checker, expect


@checker
def blocks_left(answer):
    """An 8B model on cards of 24 and 80 GiB, alone and in pairs, and one that does not fit."""
    gib, kv = 2**30, 131_072
    for memory, share, weights, other, block_size, cards in (
        (24 * gib, 0.9, 16.1e9, 1.3e9, 16, 1),
        (80 * gib, 0.9, 16.1e9, 3.5e9, 16, 1),
        (24 * gib, 0.8, 16.1e9, 1.3e9, 32, 2),
        (24 * gib, 0.9, 141e9, 1.3e9, 16, 2),
    ):
        asked = f"{memory // gib} GiB, utilization {share}, {weights / 1e9:g} GB of weights on {cards} cards"
        found = answer(memory, share, weights, other, kv, block_size, cards)
        expect(found is not None, "blocks_left gives None: is the `return` missing?")

        def blocks(left: float, size: float) -> float:
            return max(0, math.floor(left / size))

        left, size = memory * share - weights / cards - other, block_size * kv / cards
        right = blocks(left, size)
        if found == right and isinstance(found, int):
            continue
        expect(found != right, f"{asked}: blocks are whole: an int is asked for, not {found!r}")
        expect(found >= 0, f"{asked}: the weights alone are more than the budget, so there are 0 blocks, not {found}")
        mistakes = {
            "the share is of the whole memory, and the rest is taken from it": blocks(
                share * (memory - weights / cards - other), size
            ),
            "the whole memory is used; the engine may take its share": blocks(memory - weights / cards - other, size),
            "other_bytes are missing": blocks(memory * share - weights / cards, size),
            "each card has other_bytes, all of them": blocks(memory * share - (weights + other) / cards, size),
            "each card has a part of the weights": blocks(memory * share - weights - other, size),
            "each card has a part of every token's keys and values": blocks(left, block_size * kv),
            "these are tokens; a block has block_size of them": blocks(left, kv / cards),
        }
        for sentence, wrong in mistakes.items():
            expect(found != wrong, f"{asked}: {sentence}")
        expect(False, f"{asked}: {right:,} blocks, and yours gives {found:,}")


@checker
def step_line(answer):
    """Points on a line, and the table of the notes."""
    line = [4, 8, 16, 32]
    for name, clients, rates in (
        ("20 ms + 1 ms a client", line, [n / (0.020 + 0.001 * n) for n in line]),
        ("5 ms + 2 ms a client", [1, 2, 3], [n / (0.005 + 0.002 * n) for n in (1, 2, 3)]),
        ("the notes' table", line, [88.6, 163.3, 295.0, 411.7]),
    ):
        found = answer(list(clients), list(rates))
        expect(found is not None, "step_line gives None: is the `return` missing?")
        is_pair = isinstance(found, tuple | list) and len(found) == 2
        expect(is_pair, f"{name}: a pair (a, b) is asked for, not {found!r}")
        a, b = (float(value) for value in found)
        right = _line(clients, [n / rate for n, rate in zip(clients, rates, strict=True)])
        if all(math.isclose(x, y, rel_tol=1e-6) for x, y in zip((a, b), right, strict=True)):
            continue
        mistakes = {
            "a and b are exchanged": right[::-1],
            "this is the line of the rates; a step takes clients / rate": _line(clients, rates),
            "a step gives a token to each client, so it takes clients / rate, not 1 / rate": _line(
                clients, [1 / rate for rate in rates]
            ),
            "in seconds, not in milliseconds": (1e3 * right[0], 1e3 * right[1]),
        }
        for sentence, wrong in mistakes.items():
            expect(
                not all(math.isclose(x, y, rel_tol=1e-6) for x, y in zip((a, b), wrong, strict=True)),
                f"{name}: {sentence}",
            )
        ends = (n / rate for n, rate in zip(clients, rates, strict=True))
        first, *_, last = ends
        slope = (last - first) / (clients[-1] - clients[0])
        expect(
            not math.isclose(b, slope, rel_tol=1e-6),
            f"{name}: this is the line through the first and the last point; least squares uses all",
        )
        expect(
            False,
            f"{name}: {1e3 * right[0]:.2f} ms + {1e3 * right[1]:.2f} ms a client, and yours gives "
            f"{1e3 * a:.4g} and {1e3 * b:.4g}",
        )


def _line(xs, ys) -> tuple[float, float]:
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    b = sum((p - x) * (q - y) for p, q in zip(xs, ys, strict=True)) / sum((p - x) ** 2 for p in xs)
    return y - b * x, b


@checker
def capacity(answer):
    """Limits in and outside the interval, and the number of runs counted."""
    for limit, low, high in ((3.7, 0.25, 32), (31.9, 0.25, 32), (0.26, 0.25, 32), (100.0, 1, 64), (0.1, 0.25, 32)):
        tried: list[float] = []

        def kept(rate: float, limit: float = limit, tried: list[float] = tried) -> bool:
            tried.append(rate)
            expect(len(tried) <= 60, f"after 60 runs with the limit at {limit} there is no answer yet")
            return rate <= limit

        asked = f"a promise that is kept up to {limit}, between {low} and {high}"
        found = answer(kept, low, high)
        expect(found is not None, "capacity gives None: is the `return` missing?")
        if limit < low:
            expect(found == 0, f"{asked}: even low breaks it, so 0 is asked for, not {found}")
            continue
        right = min(limit, high)
        expect(found <= right, f"{asked}: at {found:.4g} it is broken, or not known to be kept")
        expect(found >= 0.99 * right, f"{asked}: {found:.4g} is more than 1 % too low")
        expect(len(tried) <= 20, f"{asked}: {len(tried)} runs; halving the interval needs less than 20")


@checker
def cost_per_million(answer):
    """Services of one card and of many."""
    for rate, tokens, peak, carried, price in (
        (2.0, 500, 1.0, 4.0, 2.0),
        (10.0, 300, 3.0, 4.0, 1.5),
        (7.0, 640, 2.5, 3.5, 3.0),
    ):
        asked = f"{rate:g} requests/s of {tokens} tokens, peak {peak:g} times, {carried:g} a card, price {price:g}"
        found = answer(rate, tokens, peak, carried, price)
        expect(found is not None, "cost_per_million gives None: is the `return` missing?")

        def cost(cards: float, sold: float, price: float = price) -> float:
            return 1e6 * cards * price / (3600 * sold)

        cards, sold = math.ceil(rate * peak / carried), rate * tokens
        right = cost(cards, sold)
        if math.isclose(float(found), right, rel_tol=1e-6):
            continue
        mistakes = {
            "cards are whole": cost(rate * peak / carried, sold),
            "the cards must carry the peak": cost(math.ceil(rate / carried), sold),
            "the tokens are those of the average, not of the peak": cost(cards, sold * peak),
            "a million requests are counted, not a million tokens": cost(cards, rate),
            "the price is of an hour, which has 3,600 s": 3600 * right,
            "the cards of the peak are all paid for": cost(1, sold),
            "this is a card at its capacity, and no card is always full": cost(1, carried * tokens),
        }
        for sentence, wrong in mistakes.items():
            expect(not math.isclose(float(found), wrong, rel_tol=1e-6), f"{asked}: {sentence}")
        expect(False, f"{asked}: {right:.4g}, and yours gives {float(found):.4g}")
