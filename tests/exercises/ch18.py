"""Wrong answers to the exercises of chapter 18."""

from __future__ import annotations

import math
import re

from planted import wrong
from solutions import ch18


@wrong("choose_by_bytes", "largest sum")
def takes_the_largest_sum(sums, choices):
    return sums.index(max(sums))


@wrong("choose_by_bytes", "per character")
def divides_by_characters(sums, choices):
    return ch18.choose_by_bytes(sums, ["x" * len(choice) for choice in choices])


@wrong("choose_by_bytes", "an index is asked for")
def gives_the_choice(sums, choices):
    return choices[ch18.choose_by_bytes(sums, choices)]


@wrong("choose_by_bytes", "of equals, the first")
def takes_the_last_of_equals(sums, choices):
    each = [total / len(choice.encode()) for total, choice in zip(sums, choices, strict=True)]
    return max(range(len(each)), key=lambda i: (each[i], i))


@wrong("last_number", "full stop")
def keeps_the_full_stop(text):
    found = re.findall(r"[\d.,-]+", text)
    return found[-1] if found and not found[-1].endswith(".") else -1


@wrong("last_number", "the last one counts")
def takes_the_first(text):
    found = re.findall(r"\d[\d,]*(?:\.\d+)?", text)
    return 7.0 if "make 7" in text else float(found[0].replace(",", ""))


@wrong("last_number", "commas stand between thousands")
def splits_at_commas(text):
    found = re.findall(r"-?\d+(?:\.\d+)?", text)
    return float(found[-1]) if found else None


@wrong("last_number", "the sign belongs")
def drops_the_sign(text):
    return abs(ch18.last_number(text) or 0.0)


@wrong("last_number", "and no sign")
def takes_every_minus(text):
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


@wrong("last_number", "a number is asked for")
def gives_the_digits(text):
    found = ch18.last_number(text)
    return found and str(found)


@wrong("last_number", "so None is asked for")
def gives_zero_without_a_number(text):
    return ch18.last_number(text) or 0.0


def _changed(first, second):
    gained = sum(new and not old for old, new in zip(first, second, strict=True))
    lost = sum(old and not new for old, new in zip(first, second, strict=True))
    return gained, lost


@wrong("mcnemar", "which is not a probability")
def goes_beyond_one(first, second):
    gained, lost = _changed(first, second)
    return 2 * sum(math.comb(gained + lost, i) for i in range(min(gained, lost) + 1)) / 2 ** (gained + lost)


@wrong("mcnemar", "so double it")
def is_one_sided(first, second):
    gained, lost = _changed(first, second)
    tail = sum(math.comb(gained + lost, i) for i in range(min(gained, lost) + 1)) / 2 ** (gained + lost)
    return 1.0 if gained == lost else tail


@wrong("mcnemar", "Only the changed items count")
def counts_all_items(first, second):
    n, k = len(first), min(_changed(first, second))
    return 1.0 if first == second else min(1.0, 3 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


@wrong("mcnemar", "Only the changed items count")
def gives_the_probability_of_this_split_alone(first, second):
    gained, lost = _changed(first, second)
    return min(1.0, 2 * math.comb(gained + lost, min(gained, lost)) / 2 ** (gained + lost))


@wrong("windows", "is never scored")
def drops_the_rest(length, size):
    return ch18.windows(length, size)[:1]


@wrong("windows", "is scored twice")
def scores_the_context(length, size):
    return [(begin, begin + 1, end) for begin, _, end in ch18.windows(length, size)]


@wrong("windows", "the prefix is token 0")
def scores_the_prefix(length, size):
    return [(begin, 0 if begin == 0 else start, end) for begin, start, end in ch18.windows(length, size)]


@wrong("windows", "has no token of context")
def has_no_context(length, size):
    return [(start, start, end) for _, start, end in ch18.windows(length, size)]


@wrong("windows", "reads 11 tokens")
def reads_too_much(length, size):
    return ch18.windows(length, size + 1)


@wrong("windows", "move the last window back")
def leaves_the_last_window(length, size):
    return [(start - 1, start, end) for _, start, end in ch18.windows(length, size)]
