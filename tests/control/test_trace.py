"""Trace: every step as it was, and the pool of any of them built again from events."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling import EOS, Source, add, carry_out, counts, make_scheduler, run, update

from paged_infer.control.blocks.pool import BlockPool
from paged_infer.control.policies import POLICIES, Dynamic, make_policy
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.sequence_state import SequenceState
from paged_infer.control.trace import Trace

WAITING, RUNNING, SWAPPED, _ = SequenceState


def picture(pool: BlockPool) -> tuple:
    """Everything about a pool but what its hashes are."""
    return pool._counts[:], list(pool._blank), list(pool._cached), set(pool._hash_of), pool.num_evictions


def traced(num_blocks: int = 100, *args, **options) -> Scheduler:
    return make_scheduler(num_blocks, *args, trace=Trace(num_blocks), **options)


@given(
    num_blocks=st.integers(8, 14),
    num_swap_blocks=st.sampled_from([0, 3, 8]),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=8),
    policy=st.sampled_from([*POLICIES]),
    caching=st.booleans(),
    fails=st.sets(st.integers(0, 30)),
    aborts=st.sets(st.integers(0, 30), max_size=3),
)
def test_the_pool_of_any_step_is_built_again(
    num_blocks, num_swap_blocks, lengths, policy, caching, fails, aborts
) -> None:
    scheduler = traced(num_blocks, 2, 4, 16, num_swap_blocks, policy=make_policy(policy), enable_prefix_caching=caching)
    source, pictures = Source(), []
    sequences = [
        sequence
        for index, length in enumerate(lengths)
        for sequence in source.request(length, story=index % 2, n=1 + (length < 4), max_tokens=3).sequences
    ]
    scheduler.add(sequences)
    for number in range(60):
        step = scheduler.schedule(float(number))
        tables = {s.sequence_id: t for s in sequences if (t := scheduler.manager.table(s.sequence_id))}
        queues = {RUNNING: scheduler.running, WAITING: scheduler.waiting, SWAPPED: scheduler.swapped}
        states = {s.sequence_id: state for state, queue in queues.items() for s in queue}
        computed = {s.sequence_id: s.num_computed_tokens for s in sequences if s.sequence_id in {*tables, *states}}
        pictures.append((picture(scheduler.manager.pool), tables, states, computed))
        record = scheduler.trace.steps[-1]
        assert record.scheduled == counts(step) and record.num_tokens == step.num_tokens
        assert (record.num_running, record.num_waiting) == (len(scheduler.running), len(scheduler.waiting))
        if number in aborts:
            scheduler.finish(sequences[number % len(sequences)], "abort")
        if number not in fails:
            update(scheduler, step, {i: EOS if i % 3 else 5 for i in step.sampling}, number + 0.5)
        assert record.ended_s == (None if number in fails else number + 0.5)
    for place, (pool, tables, states, computed) in enumerate(pictures):
        replay = scheduler.trace.replay(place)
        assert picture(replay.pool) == pool
        assert {i: t for i, t in replay.tables.items() if t} == tables and replay.states == states
        assert replay.computed == computed


def test_hits_of_one_step_show_in_its_record() -> None:
    scheduler, source = traced(block_size=4), Source()
    scheduler.add([source.sequence(11, story=1) for _ in range(3)])
    run(scheduler)
    (step,) = scheduler.trace.steps
    assert (step.num_tokens, step.num_hit_tokens, step.num_looked_up_tokens) == (17, 16, 33)
    assert scheduler.trace.hit_rate == 16 / 33
    assert step.prefills == (0, 1, 2)
    run(scheduler)
    assert scheduler.trace.steps[1].prefills == ()


def test_perfetto_opens_what_is_written(tmp_path: Path) -> None:
    """The fields that Chrome's trace format asks of each kind of event, and nothing that ends before it begins."""
    scheduler, source = traced(4, 4, num_swap_blocks=4), Source()
    add(scheduler, source, 7, 7, 3, max_tokens=6)
    now = 100.0
    while scheduler.has_work:
        step = scheduler.schedule(now)
        update(scheduler, step, dict.fromkeys(step.sampling, 5), now + 0.25)
        now += 0.5
    scheduler.trace.to_perfetto(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for event in events:
        assert {"name", "ph", "pid"} <= event.keys()
        assert event["ph"] in ("X", "C", "M")
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0 and isinstance(event["tid"], int)
    steps = [e for e in events if e["name"] == "step 1"]
    assert [(e["ts"], e["dur"]) for e in steps] == [(0.0, 250_000.0)]
    names = {e["name"] for e in events if e["pid"] == 2}
    assert {"prefill", "decode", "waiting", "swapped", "request r0, sequence 0"} - names == {
        "request r0, sequence 0"  # that one is the name of a track
    }
    Trace(4).to_perfetto(tmp_path / "empty.json")


def test_only_a_step_that_failed_is_said_to_have_failed(tmp_path: Path) -> None:
    """Not one in which a batch waited for its window, nor one that is still out."""
    scheduler, source = traced(policy=Dynamic(window_s=5.0)), Source()
    add(scheduler, source, 3, max_tokens=3)
    for now in (0.0, 6.0, 7.0, 8.0, 9.0):  # waits, computes, fails, computes, is out
        step = scheduler.schedule(now)
        if now in (6.0, 8.0):
            update(scheduler, step, dict.fromkeys(step.sampling, 5), now + 0.5)
    scheduler.trace.to_perfetto(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [e["name"] for e in events if e["pid"] == 1 and e["ph"] == "X"]
    assert names == ["step 1 (waits)", "step 2", "step 3 (failed)", "step 4", "step 5 (not ended)"]


def test_the_hit_rate_counts_nobody_twice_who_came_in_with_a_step_that_failed() -> None:
    scheduler, source = traced(block_size=4), Source()
    scheduler.add([source.sequence(9, story=1)])
    run(scheduler)
    scheduler.add([source.sequence(9, story=1)])
    scheduler.schedule()
    assert scheduler.trace.hit_rate == 0  # of what has been computed
    run(scheduler)
    assert scheduler.trace.hit_rate == scheduler.stats.prefix_hit_tokens / 18 == 8 / 18


def test_a_chunk_of_one_token_is_no_decode_while_more_are_known() -> None:
    scheduler, source = traced(9, 4, 4, 1, enable_prefix_caching=False), Source()
    scheduler.add(source.request(3, n=2, max_tokens=4).sequences)
    run(scheduler, 3)
    assert scheduler.schedule().transfers.copies  # and fails: who was to be copied begins again, with what it has said
    again = [run(scheduler) for _ in range(6)]
    chunks = [[s.sequence_id for s in step.sequences if s.sample is None] for step in again]
    assert sum(map(len, chunks)) == 3  # the fourth token that it knows draws
    assert [list(step.prefills) for step in scheduler.trace.steps[-6:]] == chunks


def test_a_trace_of_a_busy_engine_stays_small() -> None:
    """256 decodes: a few kilobytes a step."""
    scheduler, source = traced(2000, 16, 256, 2048), Source()
    add(scheduler, source, *[8] * 256, max_tokens=60)
    for _ in range(50):
        carry_out(scheduler, scheduler.schedule())
    num_bytes = len(pickle.dumps(scheduler.trace)) / 50
    assert num_bytes < 6000


@pytest.mark.parametrize("traces", [False, True])
def test_a_trace_is_kept_only_where_it_is_asked_for(traces: bool) -> None:
    scheduler = traced() if traces else make_scheduler()
    add(scheduler, Source(), 5)
    run(scheduler, 2)
    assert (scheduler.trace is not None) == traces
    assert len(scheduler.manager.events) <= 2  # nothing piles up where nobody reads it


def test_keeping_a_trace_costs_little() -> None:
    """Less than a tenth of the calls that scheduling 256 sequences takes."""
    plain, tracing = make_scheduler(2000, 16, 256, 2048), traced(2000, 16, 256, 2048)
    for scheduler in (plain, tracing):
        add(scheduler, Source(), *[8] * 256, max_tokens=100)
    for _ in range(20):
        num_plain, num_traced = (calls_of_a_step(scheduler) for scheduler in (plain, tracing))
        assert num_plain < num_traced < 1.1 * num_plain


def calls_of_a_step(scheduler: Scheduler) -> int:
    """Calls of Python's and of C's functions: a clock would count what else the machine does, too."""
    num_calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        step = scheduler.schedule()
    finally:
        sys.setprofile(before)
    carry_out(scheduler, step)
    return num_calls
