"""Solutions to the exercises of chapter 18, is it any good?"""

from __future__ import annotations

import math
import re


def choose_by_bytes(sums, choices):
    """``max`` with a key gives the first of equals."""
    per_byte = [total / len(choice.encode()) for total, choice in zip(sums, choices, strict=True)]
    return per_byte.index(max(per_byte))


def last_number(text):
    """A full stop counts only before a digit, a minus only where no word ends."""
    found = re.findall(r"(?:(?<!\w)-)?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def mcnemar(first, second):
    """Only the changed items count."""
    gained = sum(new and not old for old, new in zip(first, second, strict=True))
    lost = sum(old and not new for old, new in zip(first, second, strict=True))
    tail = sum(math.comb(gained + lost, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (gained + lost))


def windows(length, size):
    """The package's ``evaluation.models.windows``, in positions."""
    found, end = [], 1
    while end < length + 1:
        start, end = end, min(length + 1, size if end == 1 else end + size - 1)
        found.append((max(0, end - size), start, end))
    return found
