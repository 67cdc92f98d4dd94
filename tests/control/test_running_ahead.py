"""Steps planned while the one before is under way: the same tokens as one at a time, whatever else happens."""

from __future__ import annotations

import random
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import EOS, FakeMemory, Source, make_scheduler

from paged_infer.control.blocks.pool import BlockPool
from paged_infer.control.request import Request
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.sequence import PLACEHOLDER, Sequence
from paged_infer.control.step import ScheduledStep, StepResult
from paged_infer.control.trace import Replay, Trace


class Device:
    """Carries steps out in order, knows what it drew in the step before, and draws by what a sequence has said."""

    def __init__(self, sequences: list[Sequence], block_size: int) -> None:
        self.sequences = {s.sequence_id: s for s in sequences}
        self.memory = FakeMemory(block_size)
        self.last: dict[int, int] = {}

    def run(self, step: ScheduledStep) -> dict[int, int]:
        tokens = {i: self._real_tokens(self.sequences[i]) for i in self.sequences}
        views = {i: SimpleNamespace(token_ids=tokens[i], cache_root=self.sequences[i].cache_root) for i in tokens}
        self.memory.execute(step, views)
        self.last = {i: self._draw(tokens[i], i) for i in step.sampling}
        return self.last

    def _real_tokens(self, sequence: Sequence) -> list[int]:
        return [self.last.get(sequence.sequence_id, 0) if t == PLACEHOLDER else t for t in sequence.token_ids]

    def _draw(self, tokens: list[int], sequence_id: int) -> int:
        rng = random.Random(f"{tokens} {self.sequences[sequence_id].sample_index}")
        return EOS if rng.random() < 0.15 else rng.randint(2, 4)


def serve(
    scheduler: Scheduler,
    shapes: list[tuple[int, int, int]],
    *,
    ahead: bool,
    fails: frozenset[int] = frozenset(),
    aborts: dict[int, int] | None = None,
) -> list[Request]:
    source = Source()
    requests = [source.request(p, story=i % 2, n=n, max_tokens=m) for i, (p, n, m) in enumerate(shapes)]
    everybody = [s for request in requests for s in request.sequences]
    for request in requests:
        scheduler.add(request.sequences)
    device, replay = (
        Device(everybody, scheduler.manager.block_size),
        Replay(BlockPool(scheduler.manager.pool.num_blocks)),
    )
    out: tuple[ScheduledStep, dict[int, int]] | None = None
    for number in range(3000):
        if not scheduler.has_work and out is None:
            break
        before, out = out, None
        if scheduler.has_work:
            step = scheduler.schedule(float(number))
            if scheduler.trace is not None:
                for event in scheduler.trace.steps[-1].events:
                    replay.apply(event)
                held = {s.sequence_id: scheduler.manager.table(s.sequence_id) for s in everybody}
                assert all(table == replay.tables.get(i, ()) for i, table in held.items())
            if step.sequences:
                out = step, StepResult(device.run(step))
                scheduler.advance(step)
        if number in fails:  # what was under way is lost
            scheduler.roll_back()
            out = None
        elif before is not None:
            scheduler.settle(*before)
        if out is not None and not ahead:
            scheduler.settle(*out)
            out = None
        if number in (aborts or {}) and aborts[number] < len(everybody):
            scheduler.finish(everybody[aborts[number]], "abort")
        scheduler.check_integrity()
    assert not scheduler.has_work, "somebody starves"
    assert scheduler.manager.pool.num_used == 0 and scheduler.manager.swap.num_used == 0
    return requests


@settings(max_examples=150)
@given(
    block_size=st.integers(1, 4),
    slack=st.integers(0, 6),
    budget=st.sampled_from([1, 3, 5, 40]),
    num_swap_blocks=st.sampled_from([0, 3, 40]),
    caching=st.booleans(),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=6),
    fails=st.frozensets(st.integers(0, 40), max_size=4),
    aborts=st.dictionaries(st.integers(0, 40), st.integers(0, 9), max_size=2),
)
def test_what_is_said_does_not_depend_on_being_read_late(
    block_size, slack, budget, num_swap_blocks, caching, shapes, fails, aborts
) -> None:
    """``shapes``: (prompt, n, max_tokens). The pool is as small as the door lets it be, and a step may fail."""
    longest = max(n * -(-(prompt + most - 1) // block_size) for prompt, n, most in shapes) + slack
    scheduler = make_scheduler(
        longest,
        block_size,
        4,
        budget,
        min(num_swap_blocks, longest),
        enable_prefix_caching=caching,
        trace=Trace(longest),
    )
    late = serve(scheduler, shapes, ahead=True, fails=fails, aborts=aborts)
    roomy = serve(make_scheduler(10_000, 4, 20, 10_000), shapes, ahead=False)
    for one, alone in zip((s for r in late for s in r.sequences), (s for r in roomy for s in r.sequences), strict=True):
        said = one.output_token_ids
        if one.finish_reason == "abort":
            assert said == alone.output_token_ids[: len(said)]
        else:
            assert (said, one.finish_reason) == (alone.output_token_ids, alone.finish_reason)


def test_a_sequence_that_will_end_by_length_is_not_planned_again() -> None:
    scheduler, source = make_scheduler(), Source()
    (short,) = source.request(3, max_tokens=1).sequences
    (long,) = source.request(3, max_tokens=9).sequences
    scheduler.add([short, long])
    first = scheduler.schedule()
    scheduler.advance(first)
    assert short.is_length_capped and not long.is_length_capped
    second = scheduler.schedule()
    assert [item.sequence_id for item in second.sequences] == [long.sequence_id]
    assert second.sequences[0].token_ids == [PLACEHOLDER]


def test_a_token_drawn_after_an_unforeseen_end_is_dropped_and_its_blocks_are_free() -> None:
    scheduler, source = make_scheduler(block_size=2), Source()
    (sequence,) = source.request(3, max_tokens=9).sequences
    scheduler.add([sequence])
    first = scheduler.schedule()
    scheduler.advance(first)
    second = scheduler.schedule()
    scheduler.advance(second)
    scheduler.settle(first, StepResult({sequence.sequence_id: EOS}))
    assert sequence.finish_reason == "stop" and sequence.output_token_ids == [EOS]
    assert scheduler.settle(second, StepResult({sequence.sequence_id: 5})) == []
    assert sequence.output_token_ids == [EOS] and scheduler.manager.pool.num_used == 0


def test_a_block_is_findable_only_when_all_its_tokens_are_known() -> None:
    scheduler, source = make_scheduler(block_size=4), Source()
    (sequence,) = source.request(3, max_tokens=9).sequences
    scheduler.add([sequence])
    first = scheduler.schedule()
    scheduler.advance(first)
    second = scheduler.schedule()  # computes the token that fills the block
    scheduler.advance(second)
    assert scheduler.manager.pool.num_hashed == 0
    scheduler.settle(first, StepResult({sequence.sequence_id: 5}))
    assert scheduler.manager.pool.num_hashed == 1
    scheduler.roll_back()  # the second step is lost: nobody may find what it has perhaps not written
    assert scheduler.manager.pool.num_hashed == 0 and sequence.output_token_ids == [5]
