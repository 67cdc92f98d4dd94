"""The engine of this machine, predicted from measured steps: the fit, and a run small enough for a test."""

from __future__ import annotations

import pytest

from paged_infer import LLM
from paged_infer.bench.simulation.own_engine import METRICS, FittedSteps, compare
from paged_infer.control.step import ScheduledSequence, ScheduledStep


def step(*sequences: tuple[int, int]) -> ScheduledStep:
    return ScheduledStep(1, [ScheduledSequence(i, [0] * n, b, [], None) for i, (b, n) in enumerate(sequences)])


STEPS = [step(*[(50 * k, 1)] * k) for k in (1, 2, 3, 5, 8, 20, 40)] + [
    step((0, n), (100, 1)) for n in (2, 30, 60, 300, 900)
]


def test_a_fit_finds_the_factors_of_a_linear_machine():
    factors = [1e-3, 5e-4, 2e-5, 1e-5, 3e-4, 2e-4, 1e-7]
    seconds = [sum(f * x for f, x in zip(factors, FittedSteps.features(one), strict=True)) for one in STEPS]
    assert FittedSteps.fit(STEPS, seconds).factors == pytest.approx(factors)


def test_no_factor_is_below_zero():
    """A cost that falls with the context is left out, not subtracted from longer contexts than were measured."""
    seconds = [1e-2 - 1e-8 * FittedSteps.features(one)[6] for one in STEPS]
    fit = FittedSteps.fit(STEPS, seconds)
    assert min(fit.factors) == 0 and fit.seconds(STEPS[0]) == pytest.approx(1e-2, rel=0.2)
    with pytest.raises(ValueError, match="3 steps: at least 8"):
        FittedSteps.fit(STEPS[:3], seconds[:3])


def test_a_slope_that_no_step_shows_is_the_one_before_it():
    """A step of 900 tokens does not cost what one of 256 does, whatever the measured steps had."""
    seconds = [1e-3 + 2e-5 * (FittedSteps.features(one)[2]) for one in STEPS[-5:-2] * 3]
    fit = FittedSteps.fit(STEPS[-5:-2] * 3, seconds)
    assert fit.seconds(step((0, 900))) - fit.seconds(step((0, 256))) == pytest.approx(644 * fit.factors[2])
    assert fit.factors[2] > 0


def test_every_load_is_predicted_and_measured():
    engine = LLM(max_model_len=32).engine
    cost, loads = compare(engine, num_requests=4, shortest=2, longest=5, repeats=1)
    assert min(cost.factors) >= 0 < sum(cost.factors)
    assert [one.name for one in loads][:3] == ["all at once", "1 client", "4 clients"]
    for one in loads:
        assert one.predicted.keys() == one.measured.keys() == {" ".join(filter(None, metric)) for metric in METRICS}
        assert min(*one.predicted.values(), *one.measured.values()) > 0
        assert one.errors["makespan"] == pytest.approx(one.predicted["makespan"] / one.measured["makespan"] - 1)
    assert not engine.has_unfinished_requests and "schedule" not in vars(engine.scheduler)
