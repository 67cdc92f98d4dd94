"""Steps of an engine as JSON for the page, from which ``replay.js`` rebuilds the pool and the queues.

A record is one step, or what has happened since the last one::

    {"step": 7, "scheduled": [[0, 1, 0], [3, 32, 1]], "events": [["hold", 3, 0, [12, 13], []], ["publish", 12]], ...}

``scheduled`` lists sequences, each with its number of tokens and whether it is a prefill. Each event is the name and
the fields of one in ``control.trace_step``. Counts that are zero are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from paged_infer.control.sequence_state import SequenceState
from paged_infer.control.step_log import Taken
from paged_infer.control.trace_step import Event, TraceStep
from paged_infer.engine.snapshot import Snapshot


def event_json(event: Event) -> list[Any]:
    """The event's name in lower case, and its fields."""
    fields = (field.value if isinstance(field, SequenceState) else field for field in event)
    return [type(event).__name__.lower(), *fields]


def step_json(step: TraceStep) -> dict[str, Any]:
    """The record of one step."""
    prefills = {*step.prefills}
    counts = {
        "preempted": step.preempted,
        "rejected": list(step.rejected.items()),  # drafts, by sequence
        "looked_up": step.num_looked_up_tokens,
        "hits": step.num_hit_tokens,
        "copies": step.num_copies,
        "swapped_out": step.num_swapped_out,
        "swapped_in": step.num_swapped_in,
        "evictions": step.num_evictions,  # since the engine was created
    }
    return {
        "step": step.index,
        "scheduled": [[i, n, int(i in prefills)] for i, n in step.scheduled.items()],
        "events": [event_json(event) for event in step.events],
        **{name: value for name, value in counts.items() if value},
    }


def between_json(events: Iterable[Event]) -> dict[str, Any]:
    """The record of what has happened since the last step."""
    return {"step": None, "scheduled": [], "events": [event_json(event) for event in events]}


def records_json(taken: Taken) -> list[dict[str, Any]]:
    """All records of one observation, in order."""
    return [step_json(step) for step in taken.steps] + ([between_json(taken.events)] if taken.events else [])


def snapshot_json(snapshot: Snapshot) -> dict[str, Any]:
    """The state from which a client begins."""
    return {
        "stats": snapshot.stats,
        "block_size": snapshot.block_size,
        "sequences": snapshot.sequences,
        "hashed": snapshot.hashed,
    }
