"""What a rank answers does not depend on when it is asked: the engine may want the newest result first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from paged_infer.control.step import ScheduledStep, StepResult
from paged_infer.execution.step_delta import StepDecoder, StepEncoder
from paged_infer.execution.worker import Worker
from paged_infer.model.parallel import Traffic


def worker() -> Worker:
    """Of rank 0, with an executor that computes a step's index."""
    one = Worker()
    one._setup = SimpleNamespace(rank=0)  # type: ignore[assignment]
    one._parallel = SimpleNamespace(traffic=Traffic(6, 1, 512))  # type: ignore[assignment]
    one._decoder, one._running = StepDecoder(4), {}
    launch = lambda step: SimpleNamespace(result=lambda: StepResult({0: step.index}))  # noqa: E731
    one._executor = SimpleNamespace(launch=launch)  # type: ignore[assignment]
    return one


def test_the_result_of_a_step_may_be_requested_after_that_of_the_next() -> None:
    one, encoder = worker(), StepEncoder(4)
    for index in (1, 3):
        one.launch(encoder.encode(ScheduledStep(index, [])))
    assert one.result(3) == (3, StepResult({0: 3}), Traffic(6, 1, 512))
    assert one.result(1)[:2] == (1, StepResult({0: 1}))


def test_results_that_are_never_requested_are_dropped() -> None:
    one, encoder = worker(), StepEncoder(4)
    for index in range(9):
        one.launch(encoder.encode(ScheduledStep(index, [])))
    assert [*one._running] == [7, 8]
    with pytest.raises(KeyError):
        one.result(6)
