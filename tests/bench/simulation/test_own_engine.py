"""The engine of this machine, predicted from measured steps: the fit, and a run small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from paged_infer import LLM
from paged_infer.bench.simulation import own_engine
from paged_infer.bench.simulation.own_engine import METRICS, FittedSteps, Recorded, compare, record_steps
from paged_infer.control.step import ScheduledSequence, ScheduledStep
from paged_infer.simulation.times import TokenTimes


def step(*sequences: tuple[int, int]) -> ScheduledStep:
    return ScheduledStep(1, [ScheduledSequence(i, [0] * n, b, [], None) for i, (b, n) in enumerate(sequences)])


STEPS = [step(*[(50 * k, 1)] * k) for k in (1, 2, 3, 5, 8, 20, 40)] + [
    step((0, n), (100, 1)) for n in (2, 30, 60, 300, 900)
]


class Scheduler:
    def __init__(self, next_step: Callable[[], ScheduledStep]) -> None:
        self.next_step = next_step

    def schedule(self, now: float) -> ScheduledStep:
        return self.next_step()


def numbered(one: ScheduledStep, sequence_id: int) -> ScheduledStep:
    return replace(one, sequences=[replace(each, sequence_id=sequence_id) for each in one.sequences])


def recorded(steps: list[ScheduledStep], seconds: list[float]) -> Recorded:
    return Recorded(np.array([FittedSteps.features(one) for one in steps], float), np.array(seconds))


def test_a_fit_finds_the_factors_of_a_linear_machine():
    factors = [1e-3, 5e-4, 2e-5, 1e-5, 3e-4, 2e-4, 1e-7]
    seconds = [sum(f * x for f, x in zip(factors, FittedSteps.features(one), strict=True)) for one in STEPS]
    assert FittedSteps.fit(recorded(STEPS, seconds)).factors == pytest.approx(factors)


def test_no_factor_is_below_zero():
    """A cost that falls with the context is left out, not subtracted from longer contexts than were measured."""
    seconds = [1e-2 - 1e-8 * FittedSteps.features(one)[6] for one in STEPS]
    fit = FittedSteps.fit(recorded(STEPS, seconds))
    assert min(fit.factors) == 0 and fit.seconds(STEPS[0]) == pytest.approx(1e-2, rel=0.2)
    with pytest.raises(ValueError, match="3 steps: at least 8"):
        FittedSteps.fit(recorded(STEPS[:3], seconds[:3]))


def test_a_slope_that_no_step_shows_is_the_one_before_it():
    """A step of 900 tokens does not cost what one of 256 does, whatever the measured steps had."""
    seconds = [1e-3 + 2e-5 * (FittedSteps.features(one)[2]) for one in STEPS[-5:-2] * 3]
    fit = FittedSteps.fit(recorded(STEPS[-5:-2] * 3, seconds))
    assert fit.seconds(step((0, 900))) - fit.seconds(step((0, 256))) == pytest.approx(644 * fit.factors[2])
    assert fit.factors[2] > 0


def test_a_fit_at_another_speed_is_the_same_fit_times_that_speed():
    seconds = [1e-3 + 2e-5 * FittedSteps.features(one)[2] for one in STEPS]
    fit = FittedSteps.fit(recorded(STEPS, seconds))
    slower = fit.at_the_speed_of(recorded(STEPS[:5], [1.25 * fit.seconds(one) for one in STEPS[:5]]))
    assert slower.factors == pytest.approx([1.25 * factor for factor in fit.factors])


@pytest.mark.parametrize(("clients", "seconds"), [(None, [1, 1, 2, 1]), (2, [1, 1, 8, 1])])
def test_a_step_after_a_pause_begins_when_its_request_arrives(
    monkeypatch: pytest.MonkeyPatch, clients: int | None, seconds: list[float]
):
    """Requests 7 and 8 come at 0 and at 8, and the steps return at 1, 2, 10 and 11. Clients never pause."""
    steps = iter([step((0, 3)), step((3, 1)), step((0, 3)), step((3, 1))])
    ids = iter([7, 7, 8, 8])
    engine = SimpleNamespace(scheduler=Scheduler(lambda: numbered(next(steps), next(ids))))

    def run_engine(engine: Any, *others: object) -> Any:
        for _ in range(4):
            engine.scheduler.schedule(0.0)
        return SimpleNamespace(step_s=[1, 2, 10, 11], times=[TokenTimes(0, 3), TokenTimes(8, 3)])

    monkeypatch.setattr(own_engine, "run_engine", run_engine)
    assert record_steps(engine, None, [0, 8], clients).seconds.tolist() == seconds  # type: ignore[arg-type]


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
