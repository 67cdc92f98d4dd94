"""StepLog: each step and each event in one answer, whenever it is asked, and no log that nobody reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling import Source, add, carry_out, make_scheduler, run

from paged_infer.control import step_log
from paged_infer.control.step_log import StepLog
from paged_infer.control.trace import Trace


@given(
    begins=st.integers(0, 12),
    taken_after=st.sets(st.integers(0, 30)),
    aborts=st.sets(st.integers(0, 30), max_size=3),
    fails=st.sets(st.integers(0, 30), max_size=4),
)
def test_a_log_and_a_trace_have_the_same_steps_and_events(begins, taken_after, aborts, fails) -> None:
    trace = Trace(10)
    scheduler, source = make_scheduler(10, 2, 4, 16, 6, trace=trace), Source()
    sequences = add(scheduler, source, 7, 3, 9, 5, 12, 1, max_tokens=5)
    steps, events, num_before = [], [], 0
    for number in range(40):
        if number == begins:
            num_before = len(trace.steps)
            known = len(scheduler.manager.events)  # what has happened before is not the log's to give
            scheduler.step_log = StepLog(scheduler.manager)
        if scheduler.has_work:
            step = scheduler.schedule()
            if number not in fails:
                carry_out(scheduler, step)
        if number in aborts:
            scheduler.finish(sequences[number % len(sequences)], "abort")
        if scheduler.step_log is not None and (number in taken_after or number == 39):
            taken = scheduler.step_log.take()
            steps += taken.steps
            events += [event for one in taken.steps for event in one.events] + list(taken.events)
    assert [one.index for one in steps] == [one.index for one in trace.steps[num_before:]]
    expected = [event for one in trace.steps[num_before:] for event in one.events] + scheduler.manager.events
    assert events == expected[known:]
    assert scheduler.step_log.take() == ([], ())


def test_a_log_that_nobody_takes_from_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_log, "MOST_STEPS", 3)
    scheduler = make_scheduler()
    add(scheduler, Source(), 5, max_tokens=20)
    log = scheduler.step_log = StepLog(scheduler.manager)
    run(scheduler, 3)
    assert len(log.take().steps) == 3
    run(scheduler, 3)
    assert scheduler.step_log is log
    run(scheduler)
    assert scheduler.step_log is None
    run(scheduler)
    assert len(log.take().steps) == 3


def test_without_a_trace_and_a_log_nothing_is_recorded() -> None:
    scheduler = make_scheduler()
    add(scheduler, Source(), 5, max_tokens=3)
    run(scheduler, 2)
    assert scheduler.trace is None and scheduler._recorded is None
