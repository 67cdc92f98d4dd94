"""The state of an engine's pool and queues between two steps, as plain data: for pictures of it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from paged_infer.control.blocks.snapshot import Cell, pool_cells
from paged_infer.control.sequence import Sequence
from paged_infer.engine.engine import LLMEngine

MOST_LISTED = 64  # sequences of each queue; the counts are of all
MOST_MARKED = 65_536  # blocks of the largest pool whose free but cached blocks are included


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine between two steps."""

    stats: dict[str, int | float]
    block_size: int
    queues: dict[str, list[dict[str, Any]]]
    cells: dict[int, Cell]  # blocks that hold something


def snapshot(engine: LLMEngine) -> Snapshot:
    """Call on the engine's thread, or while no step runs."""
    scheduler, manager = engine.scheduler, engine.manager
    holders = [*scheduler.running, *scheduler.queues.draining]
    tables = ((s.sequence_id, manager.table(s.sequence_id), s.num_computed_tokens) for s in holders)
    is_marked = manager.pool.num_blocks <= MOST_MARKED
    return Snapshot(
        stats=engine.stats(),
        block_size=manager.block_size,
        queues={
            "running": _listed(scheduler.running),
            "waiting": _listed(scheduler.waiting),
            "swapped": _listed(scheduler.swapped),
        },
        cells=pool_cells(tables, manager.pool, manager.block_size, cached=is_marked),
    )


def _listed(queue: Iterable[Sequence]) -> list[dict[str, Any]]:
    return [
        {"id": one.sequence_id, "request": one.request_id, "num_tokens": one.num_tokens}
        for one, _ in zip(queue, range(MOST_LISTED), strict=False)
    ]


def timed_snapshot(engine: LLMEngine) -> tuple[float, Snapshot]:
    """A snapshot, after the seconds that it took. Of a module, so that it can be called in an engine's process."""
    began_s = time.perf_counter()
    taken = snapshot(engine)
    return time.perf_counter() - began_s, taken
