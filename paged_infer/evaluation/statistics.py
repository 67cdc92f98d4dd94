"""Error bars, and whether two models differ by more than chance.

All functions assume independent items. Items of a task are independent, since each is from a story of its own; the
tokens of one text are not, so the intervals of perplexity treat texts as items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as ReadOnlyList
from typing import NamedTuple

Z = 1.959964  # a normal variable is within this many standard deviations with probability 0.95


class Estimate(NamedTuple):
    """A value and its 95 % confidence interval: with other items, it would cover the true value in 95 of 100 cases."""

    value: float
    low: float
    high: float


def proportion(right: ReadOnlyList[bool]) -> Estimate:
    """The share of true values, with Wilson's score interval (1927). Unlike value +- Z * standard error, that stays
    within [0, 1], and does not shrink to a point if all or none are right.

    >>> [round(x, 3) for x in proportion([True] * 20)]
    [1.0, 0.839, 1.0]
    """
    n, p = len(right), sum(right) / len(right)
    centre = p + Z**2 / (2 * n)
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return Estimate(p, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def ratio(numerators: ReadOnlyList[float], denominators: ReadOnlyList[float]) -> Estimate:
    """sum(numerators) / sum(denominators), with one of each per text: nats and tokens, for example.

    The interval is Z standard errors of a ratio estimator (Cochran 1977, section 6.3), from the residuals
    numerator - value * denominator of the texts. One text has no interval: (-inf, inf).
    """
    n, total = len(numerators), sum(denominators)
    value = sum(numerators) / total
    if n < 2:
        return Estimate(value, -math.inf, math.inf)
    residuals = (top - value * bottom for top, bottom in zip(numerators, denominators, strict=True))
    error = math.sqrt(sum(one**2 for one in residuals) * n / (n - 1)) / total
    return Estimate(value, value - Z * error, value + Z * error)


class PairedAnswers(NamedTuple):
    """The answers of two models to the same items.

    Attributes:
        gained: items that the first model has wrong and the second right; ``lost``: the other way round.
        p: McNemar's exact test (1947): the probability of a split at least as uneven if each changed item is a fair
            coin.
    """

    gained: int
    lost: int
    p: float


def paired_answers(before: ReadOnlyList[bool], after: ReadOnlyList[bool]) -> PairedAnswers:
    """Compare answers. Items that both models have right, or both wrong, do not count.

    >>> paired_answers([True] * 8 + [False] * 2, [True] * 2 + [False] * 6 + [True] + [False])
    PairedAnswers(gained=1, lost=6, p=0.125)
    """
    gained = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    changed = gained + lost
    tail = sum(math.comb(changed, i) for i in range(min(gained, lost) + 1)) / 2**changed
    return PairedAnswers(gained, lost, min(1.0, 2 * tail))
