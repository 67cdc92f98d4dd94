"""Beams under the scheduler: forked, dropped, and never without each other; with random candidates and no model."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import FakeMemory, Source, make_scheduler, next_tokens, update

from paged_infer.control.blocks.pool import BlockPool
from paged_infer.control.policies import POLICIES, make_policy
from paged_infer.control.request import Request
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.step import ScheduledStep
from paged_infer.control.trace import Replay, Trace


def carry_out(scheduler: Scheduler, step: ScheduledStep, requests: list[Request]) -> None:
    drawn = dict.fromkeys(step.sampling, 5)
    sequences = {s.sequence_id: s for request in requests for s in request.sequences}
    update(scheduler, step, drawn, 0.0, candidates=next_tokens(step, sequences))


def gangs_stand_together(requests: list[Request]) -> None:
    for request in requests:
        beams = request.sequences
        if beams[0].is_beam and not beams[0].num_common_tokens:  # they have parted
            assert len({s.state for s in beams}) == 1
            assert beams[0].is_finished or len({s.num_tokens for s in beams}) == 1


def answers(request: Request) -> list[tuple[tuple[int, ...], float | None, str | None]]:
    return [(tuple(s.output_token_ids), s.score, s.finish_reason) for s in request.sequences]


@settings(max_examples=60)
@given(
    block_size=st.integers(1, 4),
    slack=st.integers(0, 6),
    budget=st.sampled_from([1, 2, 3, 5, 9, 40]),
    num_swap_blocks=st.sampled_from([0, 3, 8, 40]),
    policy=st.sampled_from([*POLICIES]),
    caching=st.booleans(),
    watermark=st.sampled_from([0, 0.2]),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4), st.integers(1, 7)), min_size=1, max_size=7),
    fails=st.sets(st.integers(0, 40), max_size=6),
    aborts=st.dictionaries(st.integers(0, 40), st.integers(0, 6), max_size=2),
)
def test_beams_are_the_same_whatever_happens_to_their_blocks(
    block_size, slack, budget, num_swap_blocks, policy, caching, watermark, shapes, fails, aborts
) -> None:
    """``shapes``: (prompt, beams or 0 for a plain sample, max_tokens). The pool is as small as the door lets it be."""
    longest = max(max(1, width) * -(-(prompt + most - 1) // block_size) for prompt, width, most in shapes)
    budget = budget if policy == "chunked" else 40
    scheduler = make_scheduler(
        longest + slack,
        block_size,
        6,
        budget,
        min(num_swap_blocks, longest + slack),
        watermark,
        enable_prefix_caching=caching,
        policy=make_policy(policy),
        trace=Trace(longest + slack),
    )
    requests = run_all(scheduler, shapes, fails, aborts)
    roomy = run_all(make_scheduler(10_000, 4, 6, 10_000), shapes)
    for request, alone in zip(requests, roomy, strict=True):
        if all(s.finish_reason != "abort" for s in request.sequences):
            assert answers(request) == answers(alone)


def run_all(scheduler, shapes, fails=frozenset(), aborts=None) -> list[Request]:
    source, memory = Source(), FakeMemory(scheduler.manager.block_size)
    requests = [
        source.request(prompt, story=place % 2, beams=width, max_tokens=most)
        for place, (prompt, width, most) in enumerate(shapes)
    ]
    by_id = {s.sequence_id: s for request in requests for s in request.sequences}
    for request in requests:
        scheduler.add(request.sequences, request.beam_params)
    replay = Replay(BlockPool(scheduler.manager.pool.num_blocks))
    for number in range(3000):
        if not scheduler.has_work:
            break
        step = scheduler.schedule(float(number))
        if scheduler.trace is not None:  # the events of forks and of gangs tell the whole story
            for event in scheduler.trace.steps[-1].events:
                replay.apply(event)
            assert all(scheduler.manager.table(i) == replay.tables.get(i, ()) for i in by_id)
            assert replay.pool.num_references == scheduler.manager.pool.num_references
        if number in (aborts or {}) and aborts[number] < len(requests):
            for sequence in requests[aborts[number]].sequences:
                scheduler.finish(sequence, "abort")
        if number in fails:
            memory.execute(step, by_id, number % 4)
        else:
            memory.execute(step, by_id)
            carry_out(scheduler, step, requests)
            scheduler.check_integrity()
            gangs_stand_together(requests)
    assert not scheduler.has_work, "somebody starves"
    assert scheduler.manager.pool.num_used == 0 and scheduler.manager.swap.num_used == 0
    return requests


def branching(scheduler: Scheduler, tokens: dict[int, list[int]]) -> ScheduledStep:
    """One step in which beam ``i`` may go on with ``tokens[i]``, the earlier the better; all others are far behind."""
    step = scheduler.schedule()
    found = {
        beam: [
            (t, -0.1 * place - (0 if beam in tokens else 90)) for place, t in enumerate(tokens.get(beam, [2, 3, 4, 5]))
        ]
        for beam in step.beam_rows
    }
    update(scheduler, step, {}, 0.0, candidates=found)
    scheduler.check_integrity()
    return step


def test_a_beam_that_goes_on_in_two_ways_takes_the_place_of_one_that_goes_on_in_none() -> None:
    scheduler, source = make_scheduler(block_size=4, enable_prefix_caching=False), Source()
    request = source.request(6, beams=2, max_tokens=20)
    scheduler.add(request.sequences, request.beam_params)
    pool, table = scheduler.manager.pool, scheduler.manager.table
    step = branching(scheduler, {0: [7, 8, 9, 10]})
    assert step.sampling == [] and step.beam_rows == [0]  # the first speaks for both
    assert [s.output_token_ids for s in request.sequences] == [[7], [8]]
    assert table(0) == table(1) and pool.num_used == 2  # forked where the prompt ends
    step = branching(scheduler, {1: [11, 12, 13, 14]})
    assert len(step.transfers.copies) == 1  # the block of p4, p5 was held twice, and the first to write got a copy
    assert [s.output_token_ids for s in request.sequences] == [[8, 12], [8, 11]]
    assert table(0) == table(1) and pool.num_used == 2  # what the first held alone is free again
    scheduler.finish(request.sequences[0], "abort")
    scheduler.finish(request.sequences[1], "abort")
    assert pool.num_used == 0 and not scheduler.has_work


def test_beams_leave_together_and_compute_their_common_beginning_once_when_they_come_back() -> None:
    scheduler, source = make_scheduler(12, 1, enable_prefix_caching=False), Source()
    old = source.request(3, max_tokens=9)
    request = source.request(3, beams=2, max_tokens=4)
    for one in (old, request):
        scheduler.add(one.sequences, one.beam_params)
    counted = []
    while scheduler.has_work:
        step = scheduler.schedule()
        counted.append({s.sequence_id: s.num_tokens for s in step.sequences})
        ways = {1: [7, 8, 9, 10], 2: [11, 12, 13, 14]}
        found = {beam: [(t, -0.1 * place) for place, t in enumerate(ways[beam])] for beam in step.beam_rows}
        update(scheduler, step, dict.fromkeys(step.sampling, 5), 0.0, candidates=found)
        scheduler.check_integrity()
        gangs_stand_together([request])
    assert [s.num_preemptions for s in (*old.sequences, *request.sequences)] == [0, 1, 1]
    came_back = counted[next(i for i, c in enumerate(counted) if i and 1 not in c) :]
    first = next(c for c in came_back if 1 in c)
    assert first[1] == 5 and 2 not in first  # all but the last token, in which they differ
    assert counted[counted.index(first) + 1] == {1: 1, 2: 1}


def test_a_failed_step_after_which_nobody_runs_lets_go_of_the_rows_that_are_done() -> None:
    scheduler, source = make_scheduler(policy=make_policy("static"), enable_prefix_caching=False), Source()
    done, request = source.sequence(1, max_tokens=1), source.request(2, beams=2)
    scheduler.add([done])
    scheduler.add(request.sequences, request.beam_params)
    carry_out(scheduler, scheduler.schedule(), [request])
    assert scheduler.queues.draining == [done]
    assert scheduler.schedule().transfers.copies  # which may not have happened: both beams have to begin again
    scheduler.roll_back()
    assert not scheduler.queues.draining and scheduler.manager.pool.num_used == 0
