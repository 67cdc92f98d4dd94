"""Scheduler: law 3 and law 2, by example and by a state machine that tries everything in any order."""

from __future__ import annotations

import pickle
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_infer.control.block_manager import BlockManager
from paged_infer.control.request import Request, Sequence, SequenceState
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.step import ScheduledStep
from paged_infer.params import SamplingParams

EOS = 1


def make_scheduler(
    num_blocks: int = 100, block_size: int = 4, max_num_seqs: int = 8, budget: int = 64
) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, block_size), max_num_seqs, budget)


class Source:
    """Makes requests with rising sequence ids, as the engine does."""

    def __init__(self, max_model_len: int = 10_000) -> None:
        self.max_model_len = max_model_len
        self.num_sequences = 0

    def request(self, num_prompt: int, **params) -> Request:
        params = SamplingParams(**{"max_tokens": 8, **params})
        prompt = [2 + (self.num_sequences + i) % 90 for i in range(num_prompt)]
        request = Request(f"r{self.num_sequences}", None, prompt, params, arrival_time_s=0.0)
        request.add_sequences(self.num_sequences, 0, self.max_model_len, (EOS,))
        self.num_sequences += params.n
        return request

    def sequence(self, num_prompt: int, **params) -> Sequence:
        return self.request(num_prompt, **params).sequences[0]


def add(scheduler: Scheduler, source: Source, *num_prompts: int, **params) -> list[Sequence]:
    sequences = [source.sequence(n, **params) for n in num_prompts]
    scheduler.add(sequences)
    return sequences


def counts(step: ScheduledStep) -> dict[int, int]:
    return {item.sequence_id: item.num_tokens for item in step.sequences}


def carry_out(scheduler: Scheduler, step: ScheduledStep, token: int = 7) -> list[Sequence]:
    return scheduler.update(step, {s.sequence_id: token for s in step.sequences if s.sample is not None})


def run(scheduler: Scheduler, num_steps: int = 1) -> ScheduledStep:
    for _ in range(num_steps):
        step = scheduler.schedule()
        carry_out(scheduler, step)
        scheduler.check_integrity()
    return step


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
    assert counts(run(scheduler)) == {
        big.sequence_id: 8
    }  # 2 blocks are left: too few for bigger, room for small
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
    assert scheduler.manager.table(young.sequence_id) == []
    assert len(scheduler.manager.table(old.sequence_id)) == 3
    assert scheduler.manager.pool.num_used == 3
    scheduler.check_integrity()


def test_a_preempted_sequence_computes_prompt_and_output_again_in_one_go() -> None:
    scheduler, source = make_scheduler(num_blocks=4, block_size=4), Source()
    _, young = add(scheduler, source, 7, 7, max_tokens=6)
    run(scheduler, 3)
    while young.state is SequenceState.WAITING:
        step = run(scheduler)
    item = next(s for s in step.sequences if s.sequence_id == young.sequence_id)
    assert (item.num_computed_tokens, item.num_tokens) == (0, 9)
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


def test_control_imports_no_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, paged_infer.control as c\n"
        "for m in pkgutil.iter_modules(c.__path__): importlib.import_module('paged_infer.control.' + m.name)\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'triton'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


class SchedulerMachine(RuleBasedStateMachine):
    """Requests of any size come, steps succeed or fail, requests are aborted; a list in arrival order knows better."""

    @initialize(
        num_blocks=st.integers(2, 14),
        block_size=st.sampled_from([1, 2, 3, 5]),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 12),
    )
    def start(self, num_blocks: int, block_size: int, max_num_seqs: int, budget: int) -> None:
        self.scheduler = make_scheduler(num_blocks, block_size, max_num_seqs, budget)
        self.source = Source()
        self.arrived: list[Sequence] = []
        self.computed: dict[
            int, int
        ] = {}  # tokens computed since admission or preemption, by the model's own count
        self.preemptions: dict[int, int] = {}

    @property
    def pool_tokens(self) -> int:
        return self.scheduler.manager.pool.num_blocks * self.scheduler.manager.block_size

    @property
    def alive(self) -> list[Sequence]:
        return [s for s in self.arrived if not s.is_finished]

    @rule(data=st.data())
    def add_request(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(1, min(3, self.scheduler.max_num_seqs)), label="n")
        most = self.pool_tokens // n - self.scheduler.manager.block_size  # whole blocks for each sample
        if most < 1:
            n, most = 1, self.pool_tokens
        num_prompt = data.draw(st.integers(1, most), label="prompt")
        max_tokens = data.draw(st.integers(1, most - num_prompt + 1), label="max_tokens")
        request = self.source.request(num_prompt, n=n, max_tokens=max_tokens)
        self.arrived += request.sequences
        self.scheduler.add(request.sequences)

    @rule(ends=st.sets(st.integers(0, 4)))
    def step(self, ends: set[int]) -> None:
        self.one_step(dict.fromkeys(ends, EOS))

    @precondition(lambda self: self.alive)
    @rule()
    def failing_step(self) -> None:
        self.checked_schedule()  # and no update

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.finish(data.draw(st.sampled_from(self.alive)), "abort")

    def one_step(self, ends: dict[int, int]) -> None:
        step = self.checked_schedule()
        drawn = {}
        for place, item in enumerate(step.sequences):
            sequence = self.arrived[item.sequence_id]
            assert list(item.token_ids) == sequence.token_ids[item.num_computed_tokens :][: item.num_tokens]
            assert item.num_computed_tokens == self.computed[item.sequence_id]  # each token once, in order
            self.computed[item.sequence_id] += item.num_tokens
            assert (item.sample is None) == (self.computed[item.sequence_id] < sequence.num_tokens)
            if item.sample is not None:
                assert item.sample.position == sequence.num_tokens
                drawn[item.sequence_id] = ends.get(place, 5)
        before = {i: self.arrived[i].num_tokens for i in drawn}
        grown = self.scheduler.update(step, drawn)
        assert [s.sequence_id for s in grown] == list(drawn)
        for sequence in grown:
            assert sequence.num_tokens == before[sequence.sequence_id] + 1
            ended = drawn[sequence.sequence_id] == EOS or sequence.num_tokens == sequence.max_total_tokens
            assert sequence.is_finished == ended

    def checked_schedule(self) -> ScheduledStep:
        were_running = list(self.scheduler.running)
        decoding = [s for s in were_running if s.num_uncomputed_tokens == 1]
        step = pickle.loads(pickle.dumps(self.scheduler.schedule()))
        scheduled = [item.sequence_id for item in step.sequences]
        assert bool(scheduled) == bool(self.alive)  # never idle while there is work
        assert step.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(set(scheduled)) == len(scheduled)
        assert all(item.num_tokens > 0 for item in step.sequences)

        preempted = [s for s in were_running if s.state is SequenceState.WAITING]
        for sequence in preempted:
            assert all(s.sequence_id < sequence.sequence_id for s in self.scheduler.running)
        for sequence in self.arrived:
            if sequence.num_preemptions != self.preemptions.get(sequence.sequence_id, 0):
                self.preemptions[sequence.sequence_id] = sequence.num_preemptions
                self.computed[sequence.sequence_id] = 0
        for sequence in self.scheduler.running:
            self.computed.setdefault(sequence.sequence_id, 0)
        # What decodes goes on decoding, unless the pool is exhausted.
        assert {s.sequence_id for s in decoding if s not in preempted} <= set(scheduled)
        for item in step.sequences:
            needed = self.scheduler.manager.blocks_for(item.num_computed_tokens + item.num_tokens)
            assert len(item.block_table) >= needed
        return step

    @invariant()
    def laws_hold(self) -> None:
        self.scheduler.check_integrity()
        assert len(self.scheduler.running) <= self.scheduler.max_num_seqs
        # First come, first served: what runs came before what waits, and both queues are in order of arrival.
        line = [s.sequence_id for s in (*self.scheduler.running, *self.scheduler.waiting)]
        assert line == sorted(line) == [s.sequence_id for s in self.alive]
        for sequence in self.scheduler.running:
            assert sequence.num_computed_tokens == self.computed[sequence.sequence_id]

    def teardown(self) -> None:
        """Everyone left gets served: the oldest in as many steps as it has tokens, then the next oldest."""
        while hasattr(self, "scheduler") and self.alive:
            oldest = self.alive[0]
            for _ in range(2 * oldest.max_total_tokens + 1):
                self.one_step({})
                assert oldest.num_preemptions == self.preemptions.get(oldest.sequence_id, 0)
                if oldest.is_finished:
                    break
            assert oldest.is_finished
        if hasattr(self, "scheduler"):
            assert self.scheduler.manager.pool.num_used == 0 and not self.scheduler.has_work


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_the_oldest_running_sequence_is_never_preempted() -> None:
    scheduler, source = make_scheduler(num_blocks=6, block_size=1), Source()
    sequences = add(scheduler, source, 1, 1, 1, 1, max_tokens=6)
    while scheduler.has_work:
        run(scheduler)
    assert sequences[0].num_preemptions == 0
    assert all(a <= b for a, b in pairwise(s.num_preemptions > 0 for s in sequences))
    assert scheduler.stats.preemptions > 0
