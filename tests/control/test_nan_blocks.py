"""Keys and values that are NaN, in blocks that others find before it is known: they cost no other request."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import NamedTuple

from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import EOS, Source, make_scheduler

from paged_infer.control.request import Request
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.sequence import PLACEHOLDER, Sequence
from paged_infer.control.step import ScheduledSequence, ScheduledStep, StepResult

POISON = 0  # a token whose keys and values are NaN
MOST = 300  # steps


class Shape(NamedTuple):
    """A request. ``poison_at``: index of a poisoned token of its prompt; ``comes``, ``aborted``: before which step."""

    num_prompt: int
    num_samples: int
    max_tokens: int
    poison_at: int | None
    comes: int
    aborted: int | None


class Device:
    """Runs steps in order, and remembers of each slot whether it is NaN.

    What a sequence computes in one step is NaN as a whole if it reads a NaN: a masked key that is NaN makes even the
    tokens before it NaN, since 0 * NaN is.
    """

    def __init__(self, sequences: Mapping[int, Sequence], block_size: int) -> None:
        self.sequences, self.block_size = sequences, block_size
        self.is_nan: dict[tuple[int, int], bool] = {}  # (block, offset)
        self.swapped: dict[int, list[bool]] = {}  # swap block -> its slots
        self.last: dict[int, int] = {}

    def run(self, step: ScheduledStep) -> StepResult:
        for block, place in step.transfers.swap_outs:
            self.swapped[place] = self._block(block)
        arriving = [(self.swapped[place], block) for place, block in step.transfers.swap_ins]
        self._fill(arriving)
        self._fill([(self._block(source), block) for source, block in step.transfers.copies])
        failed: dict[int, str] = {}
        for item in step.sequences:
            if self._compute(item):
                failed |= dict.fromkeys([item.sequence_id, *(i for i, _ in item.forks)], "NaN")
        self.last = {i: -1 if i in failed else self._draw(i) for i in step.sampling}
        return StepResult(dict(self.last), failed=failed)

    def _block(self, block: int) -> list[bool]:
        return [self.is_nan.get((block, i), False) for i in range(self.block_size)]

    def _fill(self, arriving: list[tuple[list[bool], int]]) -> None:
        for contents, block in arriving:
            self.is_nan.update(((block, i), nan) for i, nan in enumerate(contents))

    def _compute(self, item: ScheduledSequence) -> bool:
        """Whether what it computes is NaN, which is stored."""
        tokens = [self.last.get(item.sequence_id, 0) if t == PLACEHOLDER else t for t in item.token_ids]
        slots = [
            (item.block_table[position // self.block_size], position % self.block_size)
            for position in range(item.num_computed_tokens + item.num_tokens)
        ]
        read, written = slots[: item.num_computed_tokens], slots[item.num_computed_tokens :]
        nan = POISON in tokens or -1 in tokens or any(self.is_nan[slot] for slot in read)
        self.is_nan.update(dict.fromkeys(written, nan))
        return nan

    def _draw(self, sequence_id: int) -> int:
        """By what the sequence holds; sometimes poison."""
        sequence = self.sequences[sequence_id]
        tokens = [self.last.get(sequence_id, 0) if t == PLACEHOLDER else t for t in sequence.token_ids]
        rng = random.Random(f"{tokens} {sequence.sample_index}")
        return rng.choices((EOS, POISON, 2, 3), (1, 1, 8, 8))[0]


def serve(scheduler: Scheduler, shapes: list[Shape], *, ahead: bool) -> list[Request]:
    source, requests = Source(), list[Request]()
    for number, shape in enumerate(shapes):
        request = source.request(shape.num_prompt, number % 2, n=shape.num_samples, max_tokens=shape.max_tokens)
        if shape.poison_at is not None:
            for sequence in request.sequences:
                sequence.token_ids[shape.poison_at] = POISON
        requests.append(request)
    device = Device({s.sequence_id: s for r in requests for s in r.sequences}, scheduler.manager.block_size)
    last = max(max(one.comes, one.aborted or 0) for one in shapes)
    out: tuple[ScheduledStep, StepResult] | None = None
    for number in range(MOST):
        for shape, request in zip(shapes, requests, strict=True):
            if shape.comes == number:
                scheduler.add(request.sequences)
            if shape.aborted == number:
                for sequence in request.sequences:
                    scheduler.finish(sequence, "abort")
        before, out = out, None
        if scheduler.has_work:
            step = scheduler.schedule()
            if step.sequences:
                out = step, device.run(step)
                scheduler.advance(step)
        if before is not None:
            scheduler.settle(*before)
        if out is not None and not ahead:
            scheduler.settle(*out)
            out = None
        scheduler.check_integrity()
        if number > last and not scheduler.has_work and out is None:
            break
    assert not scheduler.has_work and not scheduler.has_step_in_flight, f"a request is not served in {MOST} steps"
    assert scheduler.manager.pool.num_used == 0 and scheduler.manager.swap.num_used == 0
    return requests


def alone(shape: Shape, number: int) -> Request:
    """The request where there is no other, on a scheduler that never preempts."""
    absent = shape._replace(comes=-1, aborted=None)
    shapes = [absent] * number + [shape._replace(comes=0, aborted=None)]
    return serve(make_scheduler(1000, 4, 20, 1000), shapes, ahead=False)[number]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    num_prompt, comes = draw(st.integers(1, 12)), draw(st.integers(0, 8))
    poison_at = draw(st.none() | st.integers(0, num_prompt - 1))
    aborted = draw(st.none() | st.integers(comes + 1, comes + 6))
    return Shape(num_prompt, draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, 6)), poison_at, comes, aborted)


@settings(max_examples=75 * EFFORT)
@given(
    block_size=st.integers(1, 4),
    slack=st.integers(0, 6),
    budget=st.sampled_from([3, 8, 40]),
    num_swap_blocks=st.sampled_from([0, 40]),
    ahead=st.booleans(),
    batch=st.lists(shapes(), min_size=2, max_size=7),
)
def test_nan_ends_requests_that_hold_it_and_changes_no_token_of_others(
    block_size, slack, budget, num_swap_blocks, ahead, batch
) -> None:
    most = max(one.num_samples * -(-(one.num_prompt + one.max_tokens) // block_size) for one in batch) + slack
    scheduler = make_scheduler(most, block_size, 4, budget, min(num_swap_blocks, most))
    for number, (shape, request) in enumerate(zip(batch, serve(scheduler, batch, ahead=ahead), strict=True)):
        wanted = alone(shape, number)
        fails = any(one.error for one in wanted.sequences)
        for one, expected in zip(request.sequences, wanted.sequences, strict=True):
            if one.finish_reason == "abort":
                assert one.output_token_ids == expected.output_token_ids[: one.num_output_tokens]
            elif shape.num_samples > 1 and fails:  # when the failing sample ends the others depends on the company
                assert shape.aborted is not None or any(other.error for other in request.sequences)
            else:
                assert (one.output_token_ids, one.finish_reason) == (expected.output_token_ids, expected.finish_reason)
