"""Policies that choose sequence by sequence: schedule, admit, preempt, and the priority of a request."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling import EOS, FakeMemory, Source, add, counts, make_scheduler, run, update

from paged_infer.control.policies import Chunked, Policy, Priority, check_priority, make_policy
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.sequence import Sequence
from paged_infer.control.sequence_state import SequenceState
from paged_infer.control.step_plan import StepPlan


class Scripted(Policy):
    """Does what the test says."""

    def plan(self, step: StepPlan) -> None:
        self.act(step)

    def act(self, step: StepPlan) -> None:
        raise NotImplementedError


def scripted(**options) -> tuple[Scheduler, Scripted]:
    policy = Scripted()
    return make_scheduler(policy=policy, **options), policy


def with_priorities(scheduler: Scheduler, source: Source, *priorities: int, **params) -> list[Sequence]:
    requests = [source.request(params.pop("num_prompt", 5), **params) for _ in priorities]
    sequences = [request.sequences[0] for request in requests]
    for sequence, priority in zip(sequences, priorities, strict=True):
        sequence.priority = priority
    scheduler.add(sequences)
    return sequences


def test_one_waiting_sequence_is_admitted_and_the_others_wait() -> None:
    scheduler, policy = scripted()
    first, second, third = add(scheduler, Source(), 5, 6, 7)
    policy.act = lambda step: step.admit(third)  # type: ignore[assignment, method-assign, return-value]
    assert counts(run(scheduler)) == {third.sequence_id: 7}
    assert [one.state for one in (first, second)] == [SequenceState.WAITING] * 2


def test_a_subset_runs_with_as_many_tokens_as_the_policy_gives() -> None:
    scheduler, policy = scripted()
    long, short = add(scheduler, Source(), 20, 5)
    found = []

    def act(step: StepPlan) -> None:
        found.append([step.admit(long), step.schedule(long), step.schedule(short)])

    policy.budget = 8  # type: ignore[attr-defined]
    scheduler.max_num_batched_tokens = 8
    policy.act = act  # type: ignore[method-assign]
    assert counts(run(scheduler)) == {long.sequence_id: 8}
    policy.act = lambda step: found.append([step.schedule(long, 3), step.schedule(long, 3)])  # type: ignore[method-assign]
    assert counts(run(scheduler)) == {long.sequence_id: 3}
    assert found == [[True, False, False], [True, False]]
    policy.act = lambda step: step.schedule(long, 0)  # type: ignore[assignment, method-assign, return-value]
    with pytest.raises(ValueError, match="most=0: must be at least 1"):
        scheduler.schedule()


@pytest.mark.parametrize("num_swap_blocks", [0, 8])
def test_a_preempted_sequence_makes_room_for_another_in_the_same_step(num_swap_blocks: int) -> None:
    scheduler, policy = scripted(num_blocks=4, num_swap_blocks=num_swap_blocks)
    running, urgent = add(scheduler, Source(), 13, 13, max_tokens=2)
    policy.act = lambda step: step.admit(running)  # type: ignore[assignment, method-assign, return-value]
    run(scheduler)
    done = []
    policy.act = lambda step: done.extend([step.admit(urgent), step.preempt(running), step.admit(urgent)])  # type: ignore[method-assign]
    assert counts(run(scheduler)) == {urgent.sequence_id: 13}
    assert done == [False, True, True] and running.num_preemptions == 1
    assert running.state is (SequenceState.SWAPPED if num_swap_blocks else SequenceState.WAITING)
    scheduler.policy = Chunked()
    while scheduler.has_work:
        run(scheduler)
    assert running.num_output_tokens == urgent.num_output_tokens == 2


def test_what_is_in_the_step_already_or_does_not_run_is_not_preempted() -> None:
    scheduler, policy = scripted()
    one, other = add(scheduler, Source(), 5, 5)
    found = []
    policy.act = lambda step: found.extend([step.admit(one), step.preempt(one), step.preempt(other)])  # type: ignore[method-assign]
    assert counts(run(scheduler)) == {one.sequence_id: 5} and found == [True, False, False]


class Whim(Policy):
    """Calls the methods of a step in any order, for any sequence."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.known: list[Sequence] = []

    def plan(self, step: StepPlan) -> None:
        acts = [step.schedule_running, step.resume_swapped, step.admit_waiting]
        for _ in range(self.random.randrange(9)):
            sequence = self.random.choice(self.known)
            acts.append(lambda sequence=sequence: self.one(step)(sequence))  # type: ignore[misc]
        self.random.shuffle(acts)
        for act in acts[: self.random.randrange(len(acts) + 1)]:
            act()

    def one(self, step: StepPlan):
        return self.random.choice([step.schedule, step.admit, step.admit, step.preempt])

    def victim(self, running):
        return self.random.choice(running)


@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=8),
    num_blocks=st.integers(8, 14),
    num_swap_blocks=st.sampled_from([0, 3, 8]),
    fails=st.sets(st.integers(0, 30)),
)
def test_blocks_budgets_and_tokens_stay_right_whatever_a_policy_calls(
    seed: int, lengths: list[int], num_blocks: int, num_swap_blocks: int, fails: set[int]
) -> None:
    policy = Whim(seed)
    scheduler = make_scheduler(num_blocks, 2, 4, 16, num_swap_blocks, policy=policy)
    source, memory = Source(), FakeMemory(2)
    for index, length in enumerate(lengths):
        params = {"n": 1 + (length < 4), "max_tokens": 1 + index % 3, "story": index % 2}
        policy.known += source.request(length, **params).sequences
    scheduler.add(policy.known)
    for number in range(60):
        if number == 40:  # fairness is up to the policy
            scheduler.policy = Chunked()
        step = scheduler.schedule(float(number))
        scheduler.check_integrity()
        assert step.num_tokens <= 16 and len(scheduler.running) <= 4
        memory.execute(step, dict(enumerate(policy.known)), 1 if number in fails else None)
        if number not in fails:
            update(scheduler, step, dict.fromkeys(step.sampling, EOS if number % 5 == 0 else 5))
        scheduler.check_integrity()
        if not scheduler.has_work:
            break


def test_the_lowest_priority_number_is_admitted_first_then_the_first_to_arrive() -> None:
    scheduler = make_scheduler(max_num_seqs=2, policy=Priority())
    sequences = with_priorities(scheduler, Source(), 5, 0, -3, 0, max_tokens=1)
    order = []
    while scheduler.has_work:
        order += list(counts(run(scheduler)))
    assert [sequences[i].priority for i in order] == [-3, 0, 0, 5] and order[1] < order[2]


@pytest.mark.parametrize("num_swap_blocks", [0, 8])
def test_where_blocks_are_short_the_highest_number_gives_back_its_own(num_swap_blocks: int) -> None:
    scheduler = make_scheduler(num_blocks=6, num_swap_blocks=num_swap_blocks, watermark=0.0, policy=Priority())
    late, first = with_priorities(scheduler, Source(), 9, 1, num_prompt=8, max_tokens=12)
    while scheduler.has_work:
        run(scheduler)
    assert (late.num_preemptions > 0, first.num_preemptions) == (True, 0)
    assert late.num_output_tokens == first.num_output_tokens == 12


def test_of_equal_priorities_the_policy_plans_what_chunked_plans() -> None:
    planned = []
    for policy in (Priority(), Chunked()):
        scheduler, source, steps = make_scheduler(12, 4, 4, 16, 6, policy=policy), Source(), []
        for length in (5, 20, 3, 9, 14):
            scheduler.add(source.request(length, n=1 + (length == 3), max_tokens=9).sequences)
        while scheduler.has_work:
            steps.append(counts(run(scheduler)))
        planned.append(steps)
    assert planned[0] == planned[1]


def test_a_priority_is_refused_where_no_policy_reads_it_and_where_it_is_no_integer() -> None:
    assert check_priority(0, "chunked") == 0 and check_priority(-7, "priority") == -7
    with pytest.raises(
        ValueError, match="priority=3: scheduling_policy='chunked' reads no priorities; 'priority' does"
    ):
        check_priority(3, "chunked")
    with pytest.raises(ValueError, match="scheduling_policy='Scripted' reads no priorities"):
        check_priority(3, Scripted())
    for wrong in (1.5, "high", None, True):
        with pytest.raises(ValueError, match=f"priority={wrong!r}: must be an integer"):
            check_priority(wrong, make_policy("priority"))
