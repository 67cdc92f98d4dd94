"""Error bars cover what they say, by simulation, and tests of differences equal a count by hand."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest

from paged_infer.evaluation.statistics import paired_answers, proportion, ratio


def test_wilson_s_interval_holds_the_values_that_a_score_test_does_not_reject() -> None:
    """Its ends solve |p - share| = Z sqrt(p (1 - p) / n)."""
    for right, n in [(3, 10), (10, 10), (0, 7), (95, 100)]:
        value, low, high = proportion([True] * right + [False] * (n - right))
        assert value == right / n
        for end in (low, high):
            if 0 < end < 1 - 1e-12:
                assert abs(end - value) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n))


def test_intervals_of_proportions_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = random.Random(0)
    for truth in (0.5, 0.9, 0.98):
        covered = 0
        for _ in range(2000):
            _, low, high = proportion([rng.random() < truth for _ in range(50)])
            covered += low <= truth <= high
        assert 0.92 <= covered / 2000 <= 0.98


def test_the_standard_error_of_a_ratio_is_that_of_a_bootstrap() -> None:
    rng = random.Random(1)
    tokens = [float(rng.randint(100, 500)) for _ in range(80)]
    nats = [n * rng.uniform(0.2, 0.4) for n in tokens]
    value, low, high = ratio(nats, tokens)
    assert value == pytest.approx(sum(nats) / sum(tokens))
    means = []
    for _ in range(2000):
        drawn = [rng.randrange(80) for _ in range(80)]
        means.append(sum(nats[i] for i in drawn) / sum(tokens[i] for i in drawn))
    means.sort()
    assert low == pytest.approx(means[50], abs=0.15 * (high - low))
    assert high == pytest.approx(means[1949], abs=0.15 * (high - low))


def test_one_text_has_no_interval() -> None:
    assert ratio([3.0], [10.0]) == (0.3, -math.inf, math.inf)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (0, 5), (2, 6), (4, 4), (7, 1)])
def test_mcnemar_counts_splits_that_are_at_least_as_uneven(gained: int, lost: int) -> None:
    before = [False] * gained + [True] * lost + [True] * 5 + [False] * 3
    after = [True] * gained + [False] * lost + [True] * 5 + [False] * 3
    throws = list(product([0, 1], repeat=gained + lost))
    uneven = sum(abs(2 * sum(throw) - len(throw)) >= abs(gained - lost) for throw in throws)
    assert paired_answers(before, after) == (gained, lost, pytest.approx(uneven / len(throws)))
