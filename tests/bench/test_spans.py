"""Where a step's time goes is watched from outside, adds up, and leaves nothing behind."""

from __future__ import annotations

import time

import pytest

from paged_infer import SamplingParams
from paged_infer.bench.spans import cpu_overhead_share, union_length, watch_steps

PARAMS = SamplingParams(temperature=0, max_tokens=6)


def test_spans_add_up_to_the_steps(llm):
    llm.generate([[5, 6, 7]], PARAMS, use_tqdm=False)
    with watch_steps(llm.engine) as span_s:
        start_s = time.perf_counter()
        llm.generate([[5, 6, 7], [8, 9]], PARAMS, use_tqdm=False)
        seconds = time.perf_counter() - start_s
    assert all(value > 0 for value in span_s.values()), span_s
    assert 0.5 * seconds < sum(span_s.values()) <= seconds


def test_time_lost_beside_the_model_is_overhead(llm, monkeypatch):
    """A scheduler that dawdles 20 ms a step shows as that much more overhead, and in its own span."""
    schedule = llm.engine.scheduler.schedule

    def dawdle(now):
        time.sleep(0.02)
        return schedule(now)

    monkeypatch.setattr(llm.engine.scheduler, "schedule", dawdle)
    with watch_steps(llm.engine) as span_s:
        llm.generate([[5, 6, 7]], PARAMS, use_tqdm=False)
    num_steps = PARAMS.max_tokens
    assert span_s["schedule"] > 0.02 * num_steps
    assert cpu_overhead_share(span_s) > 0.02 * num_steps / sum(span_s.values())


def test_a_slow_model_is_not_overhead(llm, monkeypatch):
    forward = llm.engine.decoder.forward
    monkeypatch.setattr(llm.engine.decoder, "forward", lambda *a: (time.sleep(0.02), forward(*a))[1])
    with watch_steps(llm.engine) as span_s:
        llm.generate([[5, 6, 7]], PARAMS, use_tqdm=False)
    assert span_s["model"] > 0.02 * PARAMS.max_tokens
    assert cpu_overhead_share(span_s) < 0.5


def test_nothing_is_left_wrapped(llm):
    engine = llm.engine
    sampler = engine.runner.sampler
    with pytest.raises(KeyError), watch_steps(engine):
        assert "step" in vars(engine)
        raise KeyError
    assert engine.runner.sampler is sampler
    for owner, name in ((engine, "step"), (engine.scheduler, "schedule"), (engine.decoder, "forward")):
        assert name not in vars(owner)


def test_the_device_is_busy_once_where_kernels_overlap():
    assert union_length([(5, 9), (0, 4), (2, 6), (20, 21), (20, 21)]) == 10
    assert union_length([]) == 0
