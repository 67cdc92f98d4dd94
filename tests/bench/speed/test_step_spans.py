"""Where a step's time goes is watched from outside, adds up, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest

from paged_infer import SamplingParams
from paged_infer.bench.speed import step_spans as spans
from paged_infer.bench.speed.step_spans import cpu_overhead_share, union_length, watch_steps

PARAMS = SamplingParams(temperature=0, max_tokens=6)


class Clock:
    """A fake clock for the spans, which only advances when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self._patch = monkeypatch.setattr
        self._patch(spans, "perf_counter", lambda: self.now_s)

    def takes(self, owner: Any, name: str, seconds: float) -> None:
        call = getattr(owner, name)

        def slow(*arguments: Any, **options: Any) -> Any:
            self.now_s += seconds
            return call(*arguments, **options)

        self._patch(owner, name, slow)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_spans_add_up_to_the_steps(llm, clock):
    """Each second is counted once, and in the part in which it passed."""
    engine, runner = llm.engine, llm.engine.executor.runner
    clock.takes(engine, "step", 1.0)
    clock.takes(engine.scheduler, "schedule", 2.0)
    clock.takes(runner, "launch", 4.0)
    clock.takes(runner.decoder, "forward", 8.0)
    clock.takes(runner.decoder, "logits", 16.0)
    clock.takes(runner.sampler, "sample", 32.0)
    clock.takes(engine.scheduler, "settle", 64.0)
    with watch_steps(engine) as span_s:
        llm.generate([[5, 6, 7], [8, 9]], PARAMS, use_tqdm=False)
    parts = {"schedule": 2.0, "pack": 4.0, "model": 8.0 + 16.0, "sample": 32.0, "update": 64.0, "rest": 1.0}
    assert span_s == {name: PARAMS.max_tokens * seconds for name, seconds in parts.items()}
    assert sum(span_s.values()) == clock.now_s
    assert cpu_overhead_share(span_s) == pytest.approx((2 + 4 + 64 + 1) / 127)


def test_seconds_of_this_machine_are_counted(llm):
    with watch_steps(llm.engine) as span_s:
        llm.generate([[5, 6, 7], [8, 9]], PARAMS, use_tqdm=False)
    assert all(value > 0 for value in span_s.values()), span_s


def test_nothing_is_left_wrapped(llm):
    engine = llm.engine
    sampler = engine.executor.runner.sampler
    with pytest.raises(KeyError), watch_steps(engine):
        assert "step" in vars(engine)
        raise KeyError
    assert engine.executor.runner.sampler is sampler
    for owner, name in ((engine, "step"), (engine.scheduler, "schedule"), (engine.decoder, "forward")):
        assert name not in vars(owner)


def test_the_device_is_busy_once_where_kernels_overlap():
    assert union_length([(5, 9), (0, 4), (2, 6), (20, 21), (20, 21)]) == 10
    assert union_length([]) == 0
