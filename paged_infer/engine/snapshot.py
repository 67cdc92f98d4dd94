"""An engine's pool and queues between two steps, and the steps since then: plain data from which to draw each step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from paged_infer.control.sequence import Sequence
from paged_infer.control.step_log import StepLog, Taken
from paged_infer.engine.engine import LLMEngine

MOST_MARKED = 65_536  # number of blocks up to which a pool's cached blocks are included


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine between two steps. With the events of later steps, its state after each of them can be rebuilt.

    ``sequences``: all unfinished ones, and finished ones that still hold blocks, in order of arrival. ``hashed``: the
    blocks in the prefix cache, held or free.
    """

    stats: dict[str, int | float]
    block_size: int
    sequences: list[dict[str, Any]]
    hashed: list[int]


@dataclass(frozen=True, slots=True)
class Observation:
    """``taken``: steps and events since the last observation. ``snapshot``: after them; None if it was not needed.

    ``follows``: False if steps are missing between the last observation and this one.
    """

    taken: Taken
    snapshot: Snapshot | None
    follows: bool
    took_s: float  # on the engine's thread


def snapshot(engine: LLMEngine) -> Snapshot:
    """The current state. Call on the engine's thread, or while no step runs."""
    queues, manager = engine.scheduler.queues, engine.manager

    def entry(one: Sequence) -> dict[str, Any]:
        return {
            "id": one.sequence_id,
            "request": one.request_id,
            "state": one.state.value,
            "num_prompt_tokens": one.num_prompt_tokens,
            "num_computed_tokens": one.num_computed_tokens,
            "table": list(manager.table(one.sequence_id)),
        }

    everyone = [*queues.running, *queues.draining, *queues.waiting, *queues.swapped]
    is_marked = manager.pool.num_blocks <= MOST_MARKED
    return Snapshot(
        stats=engine.stats(),
        block_size=manager.block_size,
        sequences=[entry(one) for one in sorted(everyone, key=lambda one: one.sequence_id)],
        hashed=sorted(manager.pool.hashed_blocks) if is_marked else [],
    )


def observe(engine: LLMEngine, whole: bool) -> Observation:
    """The steps since the last call; with ``whole``, or if that was too long ago, a snapshot too.

    A module-level function, so that it can be called in an engine's process. From the first call on, the engine keeps a
    log of its steps, until ``MOST_STEPS`` of them have passed without a call.
    """
    began_s = time.perf_counter()
    log = engine.scheduler.step_log
    follows = log is not None
    if log is None:
        log = engine.scheduler.step_log = StepLog(engine.manager)
    taken = log.take()
    state = snapshot(engine) if whole or not follows else None
    return Observation(taken, state, follows, time.perf_counter() - began_s)
