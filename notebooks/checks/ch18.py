"""Checkers of chapter 18, is it any good?"""

from __future__ import annotations

import math
import random

from checks import checker, expect
from paged_infer.evaluation import models
from paged_infer.evaluation.statistics import paired_answers


@checker
def choose_by_bytes(answer):
    """Sums, characters and bytes each choose another answer."""
    cases = [
        ([-2.0, -3.0], ["short", "a choice of some length"], 1),
        ([-2.0, -2.4, -2.2], ["eine", "Käsesoße", "Zahlen."], 1),
        ([-4.0, -4.0], ["abcd", "éé"], 0),  # equal by bytes
        ([-3.0, -3.2, -3.1], ["naïve", "éééé", "abcdefg"], 1),
    ]
    for sums, choices, right in cases:
        found, asked = answer(list(sums), list(choices)), f"choose_by_bytes({sums}, {choices})"
        expect(found is not None, f"{asked} gives None: is the `return` missing?")
        expect(isinstance(found, int), f"{asked} gives a {type(found).__name__}, and an index is asked for")
        by_characters = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
        if found != right:
            expect(found != sums.index(max(sums)), f"{asked}: that is the largest sum; divide by the bytes of each")
            expect(
                found != by_characters.index(max(by_characters)),
                f"{asked}: that is per character; é is one character, and two bytes of UTF-8",
            )
            per_byte = [total / len(choice.encode()) for total, choice in zip(sums, choices, strict=True)]
            is_equal = 0 <= found < len(sums) and per_byte[found] == per_byte[right]
            expect(
                not is_equal, f"{asked} gives {found}, which is as good as {right}: of equals, the first is asked for"
            )
            expect(False, f"{asked} gives {found}, not {right}")


@checker
def last_number(answer):
    """Commas, fractions, signs, and texts without a number."""
    for text, right, hint in (
        ("So 3 and 4 make 7.", 7.0, "a full stop that ends the sentence is no part of a number"),
        ("First 12, then 5", 5.0, "the last one counts"),
        ("The total is $1,234.50.", 1234.5, "commas stand between thousands"),
        ("It falls to -3.5 degrees", -3.5, "the sign belongs to it"),
        ("It was 1,000, I think", 1000.0, "a comma behind it is no part of it"),
        ("That is 10-3", 3.0, "here the minus is between two numbers, and no sign"),
        ("I do not know.", None, "there is no number"),
    ):
        found = answer(text)
        if right is None:
            expect(found is None, f"last_number({text!r}) gives {found}: {hint}, so None is asked for")
        else:
            expect(found is not None, f"last_number({text!r}) gives None; is the `return` missing?")
            expect(isinstance(found, int | float), f"last_number({text!r}) gives {found!r}, and a number is asked for")
            expect(math.isclose(float(found), right), f"last_number({text!r}) gives {found}, not {right}: {hint}")


@checker
def mcnemar(answer):
    """Against the package, on lists that need each part of the rule."""
    rng = random.Random(0)
    cases = [([True] * 8, [True] * 8), ([True] * 6 + [False] * 2, [False] * 6 + [True] * 2), ([True] * 5, [False] * 5)]
    cases += [tuple([rng.random() < 0.7 for _ in range(30)] for _ in range(2)) for _ in range(5)]
    cases += [([True, False, True, False], [False, True, False, True])]
    for first, second in cases:
        gained, lost, right = paired_answers(first, second)
        found, asked = answer(list(first), list(second)), f"mcnemar with {lost} items lost and {gained} gained"
        expect(found is not None, f"{asked} gives None: is the `return` missing?")
        if not math.isclose(found, right):
            tail = right / 2
            expect(not math.isclose(found, tail), f"{asked} gives {found:.4g}: the test is two-sided, so double it")
            expect(found <= 1, f"{asked} gives {found:.4g}, which is not a probability: at most 1")
            expect(False, f"{asked} gives {found:.4g}, not {right:.4g}. Only the changed items count")


@checker
def windows(answer):
    """Every token once, no window too long, and the last with all the context that fits."""
    for length, size in ((4, 10), (9, 10), (10, 10), (19, 10), (8, 3), (5, 2), (1, 2)):
        ids = list(range(length + 1))
        right = [
            (context[0], continuation[0], continuation[-1] + 1)
            for context, continuation in models.windows(ids, 1, size)
        ]
        found, asked = answer(length, size), f"windows({length}, {size})"
        expect(found is not None, f"{asked} gives None: is the `return` missing?")
        found = [tuple(one) for one in found]
        scored = [token for _, start, end in found for token in range(start, end)]
        twice = sorted({token for token in scored if scored.count(token) > 1})
        expect(not twice, f"{asked}: token {twice and twice[0]} is scored twice")
        missing = sorted(set(range(1, length + 1)) - set(scored))
        expect(not missing, f"{asked}: token {missing and missing[0]} is never scored")
        expect(0 not in scored, f"{asked}: the prefix is token 0; nothing stands before it, so it is not scored")
        for begin, start, end in found:
            expect(end - begin <= size, f"{asked}: ({begin}, {start}, {end}) reads {end - begin} tokens, not {size}")
            expect(begin < start, f"{asked}: ({begin}, {start}, {end}) has no token of context")
        expect(found == right, f"{asked} gives {found}, not {right}: move the last window back")
