"""Policies: what each one lets happen to those who decode, and to those who wait."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling import EOS, FakeMemory, Source, add, carry_out, counts, make_scheduler, run, update

from paged_infer.control.admission import check_budget
from paged_infer.control.policies import POLICIES, Chunked, Dynamic, Policy, PrefillFirst, Static, make_policy
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.sequence import Sequence
from paged_infer.control.step_plan import StepPlan


def longest_silence(scheduler: Scheduler, num_steps: int = 30) -> int:
    """Most steps that a decoding request went without a token while one-token requests kept arriving."""
    source = Source()
    (decoding,) = add(scheduler, source, 3, max_tokens=1000)
    carry_out(scheduler, scheduler.schedule(0.0))
    silence = longest = 0
    for now in range(1, num_steps):
        add(scheduler, source, *[20] * 3, max_tokens=1)
        step = scheduler.schedule(float(now))
        carry_out(scheduler, step)
        silence = 0 if decoding.sequence_id in counts(step) else silence + 1
        longest = max(longest, silence)
    return longest


def test_decodes_starve_behind_prompts_that_go_first_unless_those_are_delayed() -> None:
    assert longest_silence(make_scheduler(policy=PrefillFirst())) == 29  # not one token
    assert longest_silence(make_scheduler(policy=PrefillFirst(delay_factor=1.0))) == 1
    assert longest_silence(make_scheduler(policy=PrefillFirst(delay_factor=0.5))) == 1


@pytest.mark.parametrize("policy", [Chunked, Static, Dynamic])
def test_decodes_starve_under_no_other_policy(policy) -> None:
    assert longest_silence(make_scheduler(policy=policy())) == 0


def test_prefill_first_computes_whole_prompts_alone() -> None:
    scheduler, source = make_scheduler(budget=20, policy=PrefillFirst()), Source()
    old, _ = add(scheduler, source, 5, 5, max_tokens=9)
    run(scheduler)
    long, last = add(scheduler, source, 19, 6)
    assert counts(run(scheduler)) == {long.sequence_id: 19}
    assert counts(run(scheduler)) == {last.sequence_id: 6}
    assert list(counts(run(scheduler)).values()) == [1] * 4
    assert old.num_output_tokens == 2


def test_a_static_batch_leaves_together() -> None:
    scheduler, source = make_scheduler(policy=Static()), Source()
    short, long = add(scheduler, source, 5, 5, max_tokens=2)
    long.max_total_tokens = 10
    run(scheduler)
    (late,) = add(scheduler, source, 5)
    step = run(scheduler)
    assert set(counts(step)) == {short.sequence_id, long.sequence_id} and short.is_finished
    assert scheduler.manager.table(short.sequence_id) and scheduler.queues.draining == [short]
    while not long.is_finished:
        assert counts(run(scheduler)) == {long.sequence_id: 1}  # the row that is done computes nothing
    assert scheduler.queues.draining == [] and scheduler.manager.pool.num_used == 0
    assert counts(run(scheduler)) == {late.sequence_id: 5}


def test_a_static_batch_is_filled_over_as_many_steps_as_its_prompts_need() -> None:
    scheduler, source = make_scheduler(budget=12, policy=Static()), Source()
    add(scheduler, source, *[10] * 3)
    assert [len(counts(run(scheduler))) for _ in range(4)] == [1, 1, 1, 3]


def test_a_row_that_has_no_room_beside_those_that_are_done_begins_a_new_batch() -> None:
    scheduler, source = make_scheduler(num_blocks=4, block_size=4, policy=Static()), Source()
    add(scheduler, source, 7, max_tokens=2)
    (long,) = add(scheduler, source, 7, max_tokens=9)
    while scheduler.has_work:
        assert run(scheduler).sequences
    assert long.num_output_tokens == 9 and long.num_preemptions == 1


def test_an_abort_takes_back_the_blocks_of_a_row_that_was_done() -> None:
    scheduler, source = make_scheduler(policy=Static()), Source()
    done, other = add(scheduler, source, 5, 5, max_tokens=2)
    other.max_total_tokens = 20
    run(scheduler, 3)
    scheduler.finish(done, "abort")
    assert done.finish_reason == "length" and not scheduler.manager.table(done.sequence_id)
    scheduler.check_integrity()


def test_a_dynamic_batch_begins_when_it_is_full_or_its_window_is_over() -> None:
    scheduler, source = make_scheduler(policy=Dynamic(window_s=2.0, max_batch_size=3)), Source()
    add(scheduler, source, 5, 5, max_tokens=1)
    step = scheduler.schedule(1.5)
    assert not step.sequences and step.resume_at_s == 2.0
    step = scheduler.schedule(2.0)
    assert len(step.sequences) == 2
    carry_out(scheduler, step)
    add(scheduler, source, *[5] * 5, max_tokens=1)
    step = scheduler.schedule(0.0)
    assert len(step.sequences) == 3
    carry_out(scheduler, step)
    assert not scheduler.schedule(1.0).sequences
    request = source.request(5, n=4, max_tokens=1)  # more than a batch: it makes one of its own
    scheduler.add(request.sequences)
    while scheduler.has_work:
        carry_out(scheduler, scheduler.schedule(9.0))


@given(
    policy=st.sampled_from([*POLICIES]),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=8),
    num_blocks=st.integers(8, 14),
    num_swap_blocks=st.sampled_from([0, 3, 8]),
    ends=st.sets(st.integers(0, 60)),
    fails=st.sets(st.integers(0, 30)),
)
def test_everybody_is_served_under_every_policy(policy, lengths, num_blocks, num_swap_blocks, ends, fails) -> None:
    scheduler = make_scheduler(num_blocks, 2, 4, 16, num_swap_blocks, policy=make_policy(policy))
    source, memory, sequences = Source(), FakeMemory(2), []
    for index, length in enumerate(lengths):
        params = {"n": 1 + (length < 4), "max_tokens": 1 + index % 3, "story": index % 2}
        sequences += source.request(length, **params).sequences
    scheduler.add(sequences)
    for number in range(400):
        step = scheduler.schedule(float(number))
        scheduler.check_integrity()
        memory.execute(step, dict(enumerate(sequences)), 1 if number in fails else None)
        if number not in fails:
            drawn = {i: EOS if number + i in ends else 5 for i in step.sampling}
            update(scheduler, step, drawn)
        scheduler.check_integrity()
        if not scheduler.has_work:
            break
    assert all(sequence.is_finished for sequence in sequences)
    assert scheduler.manager.pool.num_used == scheduler.manager.swap.num_used == 0


class ShortestFirst(Policy):
    def plan(self, step: StepPlan) -> None:
        step.schedule_running()
        step.resume_swapped()
        sort_by_length(step.waiting)
        step.admit_waiting()


class NewcomersFirst(Policy):
    def plan(self, step: StepPlan) -> None:
        sort_by_length(step.waiting)
        step.admit_waiting()
        step.schedule_running()


def sort_by_length(queue: deque[Sequence]) -> None:
    by_length = sorted(queue, key=lambda sequence: sequence.num_tokens)
    queue.clear()
    queue.extend(by_length)


def test_places_promised_to_samples_are_kept_whatever_the_order() -> None:
    scheduler, source = make_scheduler(max_num_seqs=3, budget=4, policy=NewcomersFirst()), Source()
    scheduler.add(source.request(9, n=3, max_tokens=3).sequences)
    run(scheduler)
    add(scheduler, source, 1, 1)  # shorter than the samples whose prompt streams in
    while scheduler.has_work:
        run(scheduler)


class Forgetful(Policy):
    """Never brings anybody back from swap space."""

    def plan(self, step: StepPlan) -> None:
        step.schedule_running()
        step.admit_waiting()


class LastComeFirst(Policy):
    def plan(self, step: StepPlan) -> None:
        step.schedule_running()
        step.resume_swapped()
        step.waiting.reverse()
        step.admit_waiting()
        step.waiting.reverse()


class Idle(Policy):
    def plan(self, step: StepPlan) -> None:
        pass


@pytest.mark.parametrize("policy", [Forgetful, LastComeFirst, Idle, NewcomersFirst])
@pytest.mark.parametrize("family", [{"n": 3}, {"beams": 2}], ids=["samples", "beams"])
def test_no_policy_leaves_somebody_behind_for_ever(policy, family) -> None:
    scheduler, source = make_scheduler(8, 4, num_swap_blocks=8, policy=policy()), Source()
    sequences = add(scheduler, source, 7, 7, max_tokens=9)
    for _ in range(2):
        request = source.request(5, max_tokens=4, **family)
        scheduler.add(request.sequences, request.beam_params)
        sequences += request.sequences
    for _ in range(100):
        step = scheduler.schedule()
        ways = {beam: [(2 + beam + way, -way) for way in range(4)] for beam in step.beam_rows}
        update(scheduler, step, dict.fromkeys(step.sampling, 5), 0.0, candidates=ways)
        scheduler.check_integrity()
    assert all(sequence.is_finished for sequence in sequences)


class Failing(Chunked):
    """Does all of its work and then fails, as often as it is told to."""

    num_failures = 0

    def plan(self, step: StepPlan) -> None:
        super().plan(step)
        if self.num_failures:
            self.num_failures -= 1
            raise ZeroDivisionError


def test_a_plan_that_fails_leaves_no_block_to_be_moved_later() -> None:
    """Else a copy would be made a step late, of a block that may hold something else by then."""
    policy = Failing()
    scheduler, source, memory = make_scheduler(block_size=4, policy=policy), Source(), FakeMemory(4)
    first, second = source.request(6, n=2, max_tokens=4).sequences
    by_id = {s.sequence_id: s for s in (first, second)}
    scheduler.add([first, second])
    step = scheduler.schedule()
    memory.execute(step, by_id)
    update(scheduler, step, {0: 5, 1: 6})
    policy.num_failures = 1
    with pytest.raises(ZeroDivisionError):
        scheduler.schedule()  # which would have copied the block that both write to
    scheduler.finish(second, "abort")
    while scheduler.has_work:
        step = scheduler.schedule()
        assert not step.transfers.copies  # there is nobody left to share with
        memory.execute(step, by_id)
        carry_out(scheduler, step)
        scheduler.check_integrity()
    assert scheduler.stats.blocks_copied == 0


def test_a_policy_of_ones_own_is_ten_lines() -> None:
    scheduler, source = make_scheduler(max_num_seqs=1, policy=ShortestFirst()), Source()
    sequences = add(scheduler, source, 9, 3, 6, max_tokens=1)
    order = [s.num_prompt_tokens for _ in range(3) for s in [sequences[run(scheduler).sampling[0]]]]
    assert order == [3, 6, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("fifo",), "scheduling_policy='fifo': must be a Policy or one of chunked, prefill_first"),
        ((7,), "scheduling_policy=7: must be a Policy"),
        (("chunked", 0.5), "scheduler_delay_factor=0.5 with scheduling_policy='chunked'"),
        ((Static(), 0.5), "scheduler_delay_factor=0.5 with scheduling_policy="),
        (("prefill_first", -1.0), "scheduler_delay_factor=-1.0: must be a number >= 0"),
    ],
)
def test_what_is_no_policy_is_refused(options, message) -> None:
    with pytest.raises(ValueError) as refusal:
        make_policy(*options)
    assert message in str(refusal.value)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_that_does_not_chunk_refuses_a_budget_below_the_longest_sequence(name: str) -> None:
    policy = make_policy(name)
    check_budget(policy, 512, 512)
    if policy.chunks_prompts:
        check_budget(policy, 1, 512)
    else:
        with pytest.raises(ValueError, match="max_num_batched_tokens=511 is less than max_model_len=512"):
            check_budget(policy, 511, 512)
