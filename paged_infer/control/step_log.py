"""What is recorded of a step, and the newest steps, for a client that draws each of them while the engine runs."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import NamedTuple

from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.queues import Queues
from paged_infer.control.step_plan import StepPlan
from paged_infer.control.trace_step import Event, TraceStep

MOST_STEPS = 1024  # the most steps kept between two calls of ``take``


def trace_step(plan: StepPlan, queues: Queues) -> TraceStep:
    """The record of a step that has been planned."""
    pool, transfers = queues.manager.pool, plan.transfers
    return TraceStep(
        index=plan.index,
        began_s=plan.now,
        sequence_ids=array("q", [sequence.sequence_id for sequence, _ in plan.scheduled]),
        token_counts=array("q", [num_tokens for _, num_tokens in plan.scheduled]),
        prefills=tuple(
            s.sequence_id
            for s, _ in plan.scheduled
            if len(s.token_ids) - s.num_computed_tokens > 1 or len(s.token_ids) == s.num_prompt_tokens
        ),
        preempted=tuple(sequence.sequence_id for sequence in plan.preempted),
        num_running=len(queues.running),
        num_waiting=len(queues.waiting),
        num_swapped=len(queues.swapped),
        num_free_blocks=pool.num_free,
        num_cached_blocks=pool.num_hashed,
        num_shared_blocks=pool.num_shared,
        num_looked_up_tokens=plan.num_looked_up_tokens,
        num_hit_tokens=plan.num_hit_tokens,
        num_copies=len(transfers.copies),
        num_swapped_out=len(transfers.swap_outs),
        num_swapped_in=len(transfers.swap_ins),
        num_evictions=pool.num_evictions,
        events=tuple(queues.manager.events),
    )


class Taken(NamedTuple):
    """``steps``: those since the last call. ``events``: what has happened since the last of them."""

    steps: list[TraceStep]
    events: tuple[Event, ...]


class StepLog:
    """The steps since the last call of ``take``. Unlike a ``Trace`` it can start at any time, and is bounded.

    A log that is not read is full after ``MOST_STEPS``; the scheduler then drops it, so it costs nothing more.
    """

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager
        self._steps: list[TraceStep] = []
        self._num_taken = len(manager.events)  # of the events since the last step

    def append(self, step: TraceStep) -> bool:
        """Keep the step. Returns False if the log is full."""
        if len(self._steps) == MOST_STEPS:
            return False
        self._steps.append(step)
        return True

    def take(self) -> Taken:
        """Return and remove what is kept. Call between two steps. Each event is returned once."""
        steps, self._steps = self._steps, []
        if steps:  # the events taken before it are among those of the first step
            steps[0] = replace(steps[0], events=steps[0].events[self._num_taken :])
            self._num_taken = 0
        events = tuple(self._manager.events[self._num_taken :])
        self._num_taken = len(self._manager.events)
        return Taken(steps, events)
