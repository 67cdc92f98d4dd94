"""Scheduler: law 3 and law 2, by example and by a state machine that tries everything in any order."""

from __future__ import annotations

import pickle
import subprocess
import sys
from itertools import chain, pairwise

import pytest
from effort import EFFORT
from holding import LIMIT_S
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduling import EOS, FakeMemory, Source, add, carry_out, counts, make_scheduler, next_tokens, run, update

from paged_infer.control.queues import sample_share
from paged_infer.control.sequence import Sequence
from paged_infer.control.sequence_state import SequenceState
from paged_infer.control.step import SamplingRow, ScheduledStep


def test_a_long_prompt_streams_in_while_decodes_go_on() -> None:
    scheduler, source = make_scheduler(budget=10), Source()
    first, second = add(scheduler, source, 3, 4, max_tokens=50)
    run(scheduler)
    (long,) = add(scheduler, source, 30)
    for done in (8, 16, 24, 30):
        step = run(scheduler)
        assert counts(step)[first.sequence_id] == counts(step)[second.sequence_id] == 1
        assert long.num_computed_tokens == done
        assert long.num_output_tokens == (done == 30)


def test_the_last_token_of_a_chunked_prompt_is_the_one_that_draws() -> None:
    scheduler, source = make_scheduler(budget=4), Source()
    (sequence,) = add(scheduler, source, 10)
    draws, starts = [], []
    for _ in range(3):
        (item,) = run(scheduler).sequences
        draws.append(item.sample is not None)
        starts.append((item.num_computed_tokens, list(item.token_ids)))
    assert draws == [False, False, True]
    assert starts == [(at, sequence.token_ids[at : min(at + 4, 10)]) for at in (0, 4, 8)]


def test_many_prompts_start_in_one_step() -> None:
    scheduler, source = make_scheduler(budget=64), Source()
    add(scheduler, source, *[5] * 8)
    assert len(run(scheduler).sequences) == 8


def test_max_num_seqs_counts_the_running_ones_not_those_of_a_step() -> None:
    scheduler, source = make_scheduler(max_num_seqs=4), Source()
    add(scheduler, source, *[3] * 20)
    while scheduler.has_work:
        run(scheduler)
        assert len(scheduler.running) <= 4


def test_first_come_is_first_served_even_where_a_later_one_would_fit() -> None:
    scheduler, source = make_scheduler(num_blocks=4, block_size=4), Source()
    big, bigger, small = add(scheduler, source, 8, 12, 1, max_tokens=1)
    assert counts(run(scheduler)) == {big.sequence_id: 8}  # 2 blocks are left: too few for bigger, room for small
    assert counts(run(scheduler)) == {bigger.sequence_id: 12, small.sequence_id: 1}


def test_the_youngest_is_preempted_and_waits_at_the_head() -> None:
    scheduler, source = make_scheduler(num_blocks=4, block_size=4), Source()
    old, young = add(scheduler, source, 7, 7, max_tokens=6)
    (late,) = add(scheduler, source, 2)
    run(scheduler, 2)  # both hold 8 tokens in 2 blocks
    step = scheduler.schedule()
    assert counts(step) == {old.sequence_id: 1}
    assert list(scheduler.waiting) == [young, late]
    assert young.state is SequenceState.WAITING and young.num_computed_tokens == 0
    assert young.num_output_tokens == 2  # what was said is kept, and computed again
    assert scheduler.stats.preemptions == young.num_preemptions == 1


def test_a_preempted_sequence_gives_back_all_its_blocks() -> None:
    scheduler, source = make_scheduler(num_blocks=4, block_size=4), Source()
    old, young = add(scheduler, source, 7, 7, max_tokens=6)
    run(scheduler, 2)
    scheduler.schedule()
    assert scheduler.manager.table(young.sequence_id) == ()
    assert len(scheduler.manager.table(old.sequence_id)) == 3
    assert scheduler.manager.pool.num_used == 3
    scheduler.check_integrity()


@pytest.mark.parametrize(("caching", "start"), [(False, 0), (True, 4)])
def test_a_preempted_sequence_computes_what_is_lost_again_in_one_go(caching: bool, start: int) -> None:
    """With the prefix cache, the one of its own two full blocks that the older sequence did not take is not lost."""
    scheduler, source = make_scheduler(num_blocks=4, block_size=4, enable_prefix_caching=caching), Source()
    _, young = add(scheduler, source, 7, 7, max_tokens=6)
    run(scheduler, 3)
    while young.state is SequenceState.WAITING:
        step = run(scheduler)
    item = next(s for s in step.sequences if s.sequence_id == young.sequence_id)
    assert (item.num_computed_tokens, item.num_tokens) == (start, 9 - start)
    assert young.num_cached_tokens == 0  # its own do not count
    assert item.sample is not None and item.sample.num_output_tokens == 2


def test_a_step_that_preempts_admits_nobody() -> None:
    scheduler, source = make_scheduler(num_blocks=4, block_size=4), Source()
    old, _ = add(scheduler, source, 7, 7, max_tokens=6)
    run(scheduler, 2)
    add(scheduler, source, 1)  # would fit the block that the preemption leaves free
    assert counts(scheduler.schedule()) == {old.sequence_id: 1}


def test_a_prompt_is_not_admitted_into_blocks_promised_to_one_that_streams_in() -> None:
    scheduler, source = make_scheduler(num_blocks=6, block_size=4, budget=4), Source()
    first, second = add(scheduler, source, 16, 12, max_tokens=1)
    run(scheduler, 3)
    assert scheduler.running == [first] and list(scheduler.waiting) == [second]
    run(scheduler, 3)
    assert scheduler.stats.preemptions == 0


def test_a_failed_step_is_scheduled_again_as_it_was() -> None:
    scheduler, source = make_scheduler(budget=6), Source()
    add(scheduler, source, 4, 9)
    run(scheduler)
    failed, again = scheduler.schedule(), scheduler.schedule()
    assert failed.sequences == again.sequences
    scheduler.check_integrity()


@pytest.mark.parametrize("launched", [False, True])
def test_a_failed_step_frees_blocks_in_the_order_of_its_sequences(launched: bool) -> None:
    """Schedulers that are fed alike stay alike: no order depends on where an object lies in memory."""
    scheduler, source = make_scheduler(num_blocks=32, max_num_seqs=32, budget=256, watermark=0), Source()
    sequences = [source.sequence(3) for _ in range(32)][::-1]  # not in the order in which they were made
    scheduler.add(sequences)
    step = scheduler.schedule()
    if launched:
        scheduler.advance(step)
    blocks = [block for one in sequences for block in scheduler.manager.table(one.sequence_id)]
    assert len(blocks) == 32
    scheduler.roll_back()
    again = [block for item in scheduler.schedule().sequences for block in item.block_table]
    assert again == blocks[::-1]  # what was freed last is taken first


def test_ending_twice_changes_nothing() -> None:
    scheduler, source = make_scheduler(), Source()
    (sequence,) = add(scheduler, source, 5)
    run(scheduler)
    scheduler.finish(sequence, "abort")
    scheduler.finish(sequence, "stop", "x")
    assert sequence.finish_reason == "abort" and not scheduler.has_work
    assert scheduler.manager.pool.num_used == 0


def test_a_step_holds_the_history_only_where_a_penalty_needs_it() -> None:
    scheduler, source = make_scheduler(), Source()
    add(scheduler, source, 5)
    (penalised,) = add(scheduler, source, 5, repetition_penalty=1.1)
    run(scheduler)
    plain_row, row = (item.sample for item in scheduler.schedule().sequences)
    assert (plain_row.prompt_token_ids, plain_row.output_token_ids) == ((), ())
    assert list(row.prompt_token_ids) == penalised.token_ids[:5] and list(row.output_token_ids) == [7]


def test_end_tokens_are_named_while_min_tokens_forbids_them() -> None:
    scheduler, source = make_scheduler(), Source()
    add(scheduler, source, 5, min_tokens=3, stop_token_ids=[9])
    (item,) = scheduler.schedule().sequences
    assert item.sample.end_token_ids == (EOS, 9)


def test_prompt_logprobs_are_asked_for_once_per_prompt_token() -> None:
    scheduler, source = make_scheduler(budget=4), Source()
    request = source.request(10, n=2, prompt_logprobs=2)
    scheduler.add(request.sequences)
    reported = []
    for _ in range(8):
        for item in run(scheduler).sequences:
            assert (item.num_prompt_logprobs is not None) == bool(item.next_prompt_token_ids)
            reported += item.next_prompt_token_ids
    assert reported == request.prompt_token_ids[1:]


def test_samples_of_one_request_compute_its_prompt_once() -> None:
    scheduler, source = make_scheduler(block_size=4, budget=5, enable_prefix_caching=False), Source()
    scheduler.add(source.request(9, n=3, max_tokens=4).sequences)
    assert [counts(step := run(scheduler)) for _ in range(2)] == [{0: 5}, {0: 4}]
    assert step.sampling == [0, 1, 2]  # all from the logits of the last prompt token
    assert scheduler.manager.pool.num_used == scheduler.manager.pool.num_shared == 3
    step = run(scheduler)
    assert counts(step) == {0: 1, 1: 1, 2: 1}
    third = step.sequences[2].block_table[2]
    assert [source for source, _ in step.transfers.copies] == [third, third]  # the last to write has it for itself
    assert scheduler.manager.pool.num_used == 2 + 3 and scheduler.stats.blocks_copied == 2
    assert run(scheduler).transfers.copies == []


def test_samples_that_fork_where_a_block_ends_copy_nothing() -> None:
    scheduler, source = make_scheduler(block_size=4), Source()
    scheduler.add(source.request(8, n=3, max_tokens=4).sequences)
    run(scheduler, 4)
    assert not scheduler.has_work and scheduler.stats.blocks_copied == 0


def test_samples_come_in_as_places_allow_and_the_rest_later() -> None:
    scheduler, source = make_scheduler(max_num_seqs=4, enable_prefix_caching=False), Source()
    add(scheduler, source, 3, 3, max_tokens=3)
    samples = source.request(5, n=3, max_tokens=2).sequences
    scheduler.add(samples)
    run(scheduler)  # two places are left for three samples
    assert scheduler.running[2:] == samples[:2] and list(scheduler.waiting) == samples[2:]
    run(scheduler)
    assert [s.is_finished for s in samples] == [True, True, False]
    assert counts(run(scheduler))[samples[2].sequence_id] == 5  # without a cache, the prompt again
    run(scheduler)
    assert [s.num_output_tokens for s in samples] == [2, 2, 2] and not scheduler.has_work


def test_beams_come_in_only_when_all_of_them_have_a_place() -> None:
    scheduler, source = make_scheduler(max_num_seqs=4), Source()
    add(scheduler, source, 3, 3, max_tokens=2)
    request = source.request(5, beams=3, max_tokens=2)
    scheduler.add(request.sequences, request.beam_params)
    assert len(run(scheduler).sequences) == 2
    assert list(scheduler.waiting) == request.sequences


@pytest.mark.parametrize("caching", [False, True])
def test_samples_that_come_in_later_find_their_prompt_in_the_cache(caching: bool) -> None:
    scheduler, source = make_scheduler(max_num_seqs=2, enable_prefix_caching=caching), Source()
    scheduler.add(source.request(10, n=3, max_tokens=2).sequences)
    prompts = [item.num_tokens for _ in range(6) for item in run(scheduler).sequences if item.num_tokens > 1]
    assert prompts == ([10, 2, 2] if caching else [10, 10, 10])  # blocks of 4: two of them are full
    assert not scheduler.has_work


@pytest.mark.parametrize("max_num_seqs", [2, 4, 8, 16])
def test_a_request_of_many_samples_leaves_a_place_for_whoever_comes_next(max_num_seqs: int) -> None:
    scheduler, source = make_scheduler(max_num_seqs=max_num_seqs), Source()
    crowd = source.request(5, n=3 * max_num_seqs, max_tokens=50).sequences
    scheduler.add(crowd)
    for _ in range(3):
        run(scheduler)
        (late,) = add(scheduler, source, 3, max_tokens=1)
        run(scheduler)
        assert late.is_finished  # in the very next step
    assert len(scheduler.running) == sample_share(max_num_seqs) and not any(s.is_finished for s in crowd)


def test_a_place_that_comes_free_goes_to_the_request_that_waits_longest_for_one() -> None:
    scheduler, source = make_scheduler(max_num_seqs=4), Source()
    first, second = (source.request(3, n=6, max_tokens=50).sequences for _ in range(2))
    scheduler.add([*first, *second])
    run(scheduler)
    (late,) = add(scheduler, source, 3)
    assert scheduler.running == [*first[:3], second[0]]
    assert list(scheduler.waiting) == [*first[3:], *second[1:], late]
    scheduler.finish(first[0], "abort")
    run(scheduler)
    assert scheduler.running[-1] is first[3] and list(scheduler.waiting) == [*second[1:], late, *first[4:]]
    scheduler.finish(first[1], "abort")
    run(scheduler)
    assert scheduler.running[-1] is second[1] and list(scheduler.waiting) == [late, *first[4:], *second[2:]]


def test_where_samples_fill_the_pool_another_request_waits_for_two_batches_of_them_at_most() -> None:
    scheduler, source = make_scheduler(num_blocks=6, block_size=4, max_num_seqs=8, watermark=0), Source()
    crowd = source.request(4, n=40, max_tokens=5).sequences
    scheduler.add(crowd)
    run(scheduler)
    assert len(scheduler.running) == 6  # one block for the prompt, and one each
    (late,) = add(scheduler, source, 4, max_tokens=1)
    while not late.is_finished:
        run(scheduler)
    assert sum(s.num_output_tokens > 0 for s in crowd) <= 3 * 6
    while scheduler.has_work:
        run(scheduler)
    assert all(s.num_output_tokens == 5 for s in crowd)


def test_a_sample_that_is_preempted_shares_again_what_its_siblings_hold() -> None:
    scheduler, source = make_scheduler(num_blocks=6, block_size=4), Source()
    samples = source.request(8, n=3, max_tokens=4).sequences  # 2 blocks, and 1 each
    scheduler.add(samples)
    (other,) = add(scheduler, source, 4, max_tokens=6)
    while scheduler.has_work:
        run(scheduler)
    assert [s.num_preemptions for s in (*samples, other)] == [0, 0, 0, 1]


@pytest.mark.parametrize("gone", [0, 1, 2])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_one_sample_may_be_aborted_at_any_moment(gone: int, num_steps: int) -> None:
    scheduler, source = make_scheduler(block_size=4, budget=5), Source()
    samples = source.request(9, n=3, max_tokens=4).sequences
    scheduler.add(samples)
    for _ in range(num_steps):
        run(scheduler)
    scheduler.finish(samples[gone], "abort")
    while scheduler.has_work:
        run(scheduler)
    assert [s.num_output_tokens for s in samples if s is not samples[gone]] == [4, 4]
    assert scheduler.manager.pool.num_used == 0


def test_a_failed_fork_is_made_again() -> None:
    scheduler, source, memory = make_scheduler(block_size=4), Source(), FakeMemory(4)
    samples = source.request(6, n=3, max_tokens=4).sequences
    scheduler.add(samples)
    for fails in (True, False, True, False, False, False, False):
        step = scheduler.schedule()
        memory.execute(step, dict(enumerate(samples)), 0 if fails else None)
        if not fails:
            carry_out(scheduler, step)
        scheduler.check_integrity()
    assert not scheduler.has_work


@pytest.mark.parametrize("name", ["max_num_seqs", "budget"])
def test_a_gate_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="=0: must be at least 1"):
        make_scheduler(**{name: 0})


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_a_budget_below_max_num_seqs_serves_everyone_in_order(budget: int) -> None:
    scheduler, source = make_scheduler(budget=budget), Source()
    sequences = add(scheduler, source, 1, 5, 2, 1, 3, max_tokens=4)
    finished: list[Sequence] = []
    for _ in range(100):
        run(scheduler)
        finished += [s for s in sequences if s.is_finished and s not in finished]
    assert finished == sequences


def test_decodes_take_turns_where_the_budget_is_too_small_oldest_first() -> None:
    scheduler, source = make_scheduler(budget=2), Source()
    scheduler.add(source.request(2, n=5, max_tokens=4).sequences)
    run(scheduler)
    turns = [list(counts(run(scheduler))) for _ in range(5)]
    assert turns == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 0]]


def test_whose_turn_it_is_waits_for_room_while_the_younger_ones_compute() -> None:
    """The oldest needs a block when all others have had their turn: it is skipped, not preempted, and comes first."""
    scheduler, source = make_scheduler(num_blocks=8, block_size=1, budget=2), Source()
    first = source.sequence(2, max_tokens=6)
    scheduler.add([first, *source.request(1, n=3, max_tokens=3).sequences])
    while scheduler.has_work:
        before = first.last_step
        run(scheduler)
        assert first.is_finished or first.last_step > before or len(scheduler.running) > 2
    assert first.num_preemptions == 0


def test_control_imports_no_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, paged_infer.control as c\n"
        "for m in pkgutil.iter_modules(c.__path__): importlib.import_module('paged_infer.control.' + m.name)\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'triton'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=LIMIT_S)
    assert done.stdout.strip() == "[]"


def by_arrival(sequence: Sequence) -> int:
    return sequence.queue_number


class SchedulerMachine(RuleBasedStateMachine):
    """Samples and beams come, steps succeed or fail, some are aborted; a fake memory shows what tables mean."""

    @initialize(
        num_blocks=st.integers(2, 14),
        block_size=st.sampled_from([1, 2, 3, 5]),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 12),
        caching=st.booleans(),
        num_swap_blocks=st.sampled_from([0, 0, 2, 20]),
        watermark=st.sampled_from([0, 0.3]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        budget: int,
        caching: bool,
        num_swap_blocks: int,
        watermark: float,
    ) -> None:
        self.scheduler = make_scheduler(
            num_blocks,
            block_size,
            max_num_seqs,
            budget,
            min(num_swap_blocks, num_blocks),
            watermark,
            enable_prefix_caching=caching,
        )
        self.memory = FakeMemory(block_size)
        self.source = Source()
        self.arrived: list[Sequence] = []
        self.out_of_line = False  # whether somebody who waits may be older than somebody who runs
        self.passed: set[Sequence] = set()  # samples that wait for their siblings, while others come in

    @property
    def pool_tokens(self) -> int:
        return self.scheduler.manager.pool.num_blocks * self.scheduler.manager.block_size

    @property
    def alive(self) -> list[Sequence]:
        return [s for s in self.arrived if not s.is_finished]

    @property
    def by_id(self) -> dict[int, Sequence]:
        return dict(enumerate(self.arrived))

    @rule(
        data=st.data(),
        story=st.integers(0, 1),
        salt=st.sampled_from([None, None, "pepper"]),
        searches=st.sampled_from([False, False, True]),
    )
    def add_request(self, data: st.DataObject, story: int, salt: str | None, searches: bool) -> None:
        n = data.draw(st.integers(1, min(3, self.scheduler.max_num_seqs) if searches else 7), label="n")
        most = self.pool_tokens
        if searches:
            most = self.pool_tokens // n - self.scheduler.manager.block_size  # whole blocks for each beam
        if most < 1:
            n, most = 1, self.pool_tokens
        num_prompt = data.draw(st.integers(1, most), label="prompt")
        max_tokens = data.draw(st.integers(1, most - num_prompt + 1), label="max_tokens")
        kind = {"beams": n} if searches else {"n": n}
        request = self.source.request(num_prompt, story, salt, max_tokens=max_tokens, **kind)
        self.arrived += request.sequences
        self.scheduler.add(request.sequences, request.beam_params)

    @rule(ends=st.sets(st.integers(0, 4)))
    def step(self, ends: set[int]) -> None:
        self.one_step(dict.fromkeys(ends, EOS))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def failing_step(self, data: st.DataObject) -> None:
        step = self.checked_schedule()  # and no update
        self.out_of_line |= bool(step.transfers.copies)
        self.memory.execute(step, self.by_id, data.draw(st.integers(0, 5), label="fails_after"))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        for sequence in self.family(data):
            self.scheduler.finish(sequence, "abort")

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort_while_the_step_is_out(self, data: st.DataObject) -> None:
        step = self.checked_schedule()
        self.memory.execute(step, self.by_id)
        aborted, ways = self.family(data), next_tokens(step, self.by_id)
        for sequence in aborted:
            self.scheduler.finish(sequence, "abort")
        grown = update(self.scheduler, step, dict.fromkeys(step.sampling, 5), 0.0, candidates=ways)
        assert not {*aborted} & {*grown}

    def family(self, data: st.DataObject) -> list[Sequence]:
        """Somebody who lives: one sample, or all beams of a search."""
        sequence = data.draw(st.sampled_from(self.alive))
        return [sequence] if not sequence.is_beam else [*sequence.siblings]

    def one_step(self, ends: dict[int, int]) -> None:
        step = self.checked_schedule()
        self.memory.execute(step, self.by_id)
        drawn = {sequence_id: ends.get(place, 5) for place, sequence_id in enumerate(step.sampling)}
        before = {i: self.arrived[i].num_tokens for i in drawn}
        grown = update(self.scheduler, step, drawn, 0.0, candidates=next_tokens(step, self.by_id))
        self.gangs_stand_together()
        grown = [s for s in grown if not s.is_beam]
        assert [s.sequence_id for s in grown] == list(drawn)
        for sequence in grown:
            assert sequence.num_tokens == before[sequence.sequence_id] + 1
            ended = drawn[sequence.sequence_id] == EOS or sequence.num_tokens == sequence.max_total_tokens
            assert sequence.is_finished == ended

    def checked_schedule(self) -> ScheduledStep:
        self.scheduler.roll_back()  # a step that failed, if there was one
        self.laws_hold()
        running = {s.sequence_id: s.last_step for s in self.scheduler.running}
        stored = {s.sequence_id: s.num_computed_tokens for s in self.scheduler.swapped}
        preemptions = {s.sequence_id: s.num_preemptions for s in self.alive}
        step = pickle.loads(pickle.dumps(self.scheduler.schedule()))
        self.passed |= {s for s in self.scheduler.waiting if self.waits_for_its_siblings(s)}
        preempted = [s for s in self.alive if s.num_preemptions > preemptions[s.sequence_id]]

        scheduled = {item.sequence_id for item in step.sequences}
        assert bool(scheduled) == bool(self.alive)  # never idle while there is work
        assert step.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(scheduled) == len(step.sequences)
        for sequence in preempted:
            assert all(s.queue_number < sequence.queue_number for s in self.scheduler.running)
        for item in step.sequences:  # who was swapped computes nothing again
            assert item.num_computed_tokens == stored.get(item.sequence_id, item.num_computed_tokens)
        if scheduled - running.keys() - stored.keys():
            assert not self.scheduler.swapped
        # Who runs goes on, unless the pool is exhausted; where the budget is too small, those served longest ago do.
        # A beam that has computed all it knows waits for the others; one without room, for the gang's next turn.
        behind = {s.sequence_id for s in self.alive if scheduled.isdisjoint(b.sequence_id for b in s.sequence_group)}
        idle = {s.sequence_id for s in self.alive if not s.num_uncomputed_tokens}
        skipped = (running.keys() & behind) - idle - {s.sequence_id for s in preempted}
        if skipped and not preempted:
            assert len(running) > self.scheduler.max_num_batched_tokens
            served = max(running[i] for i in scheduled & running.keys())
            assert all(running[i] >= served for i in skipped)

        for item in step.sequences:
            sequence, end = self.arrived[item.sequence_id], item.num_computed_tokens + item.num_tokens
            assert item.num_tokens > 0
            assert list(item.token_ids) == sequence.token_ids[item.num_computed_tokens : end]
            assert len(item.block_table) >= self.scheduler.manager.blocks_for(end)
            assert (item.sample is None) == (end < sequence.num_tokens)
            if isinstance(item.sample, SamplingRow):
                assert item.sample.position == sequence.num_tokens
        self.scheduler.check_integrity()
        return step

    def waits_for_its_siblings(self, sequence: Sequence) -> bool:
        is_sample = not sequence.is_beam and len(sequence.siblings) > 1
        under_way = is_sample and sequence.leader.state is not SequenceState.WAITING
        return under_way or (is_sample and self.num_running_samples(sequence) >= self.share)

    def num_running_samples(self, sequence: Sequence) -> int:
        return sum(s.state is SequenceState.RUNNING for s in sequence.siblings)

    @property
    def share(self) -> int:
        return sample_share(self.scheduler.max_num_seqs)

    def gangs_stand_together(self) -> None:
        for sequence in self.arrived:
            if sequence.is_beam and not sequence.num_common_tokens:  # they have parted
                beams = sequence.siblings
                assert len({(s.state, s.is_finished or s.num_tokens) for s in beams}) == 1

    @invariant()
    def laws_hold(self) -> None:
        self.scheduler.check_integrity()
        assert len(self.scheduler.running) <= self.scheduler.max_num_seqs
        for one in self.scheduler.running:
            assert one.is_beam or len(one.siblings) < 2 or self.num_running_samples(one) <= self.share
        # First come, first served: what runs came before what waits, and all queues are in order of arrival.
        queues = (self.scheduler.running, self.scheduler.swapped, self.scheduler.waiting)
        self.out_of_line |= bool(queues[1])  # where swap space is full, older ones may have to wait behind these
        assert all(queue == sorted(queue, key=by_arrival) for queue in map(list, queues))
        line = [*chain.from_iterable(queues)]
        assert {*line} == {*self.alive} and len(line) == len(self.alive)
        if not self.out_of_line:
            line = [s for s in line if s not in self.passed]
            assert line == sorted(line, key=by_arrival)

    def teardown(self) -> None:
        """Everyone left gets served: the oldest in as many steps as it has tokens, then the next oldest."""
        while hasattr(self, "scheduler") and self.alive:
            oldest = min(self.alive, key=by_arrival)
            before_it = self.alive if self.out_of_line or self.passed else [oldest]
            patience = -(-self.scheduler.max_num_seqs // self.scheduler.max_num_batched_tokens)  # till its turn comes
            for _ in range(patience * sum(2 * s.max_total_tokens + 1 for s in before_it)):
                self.one_step({})
                if oldest.is_finished:
                    break
            assert oldest.is_finished
        if hasattr(self, "scheduler"):
            assert self.scheduler.manager.pool.num_used == 0 and not self.scheduler.has_work


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=40 * EFFORT, stateful_step_count=50, deadline=None)


def test_the_oldest_running_sequence_is_never_preempted() -> None:
    scheduler, source = make_scheduler(num_blocks=6, block_size=1), Source()
    sequences = add(scheduler, source, 1, 1, 1, 1, max_tokens=6)
    while scheduler.has_work:
        run(scheduler)
    assert sequences[0].num_preemptions == 0
    assert all(a <= b for a, b in pairwise(s.num_preemptions > 0 for s in sequences))
    assert scheduler.stats.preemptions > 0
