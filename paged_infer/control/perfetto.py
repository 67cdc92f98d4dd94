"""A trace in the format of Chrome and Perfetto: a track for the engine, and one for each sequence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as ReadOnlyList
from pathlib import Path
from typing import Any

from paged_infer.control.sequence_state import SequenceState
from paged_infer.control.trace_step import Arrive, End, TraceStep, Transition

_US = 1e6  # Perfetto counts microseconds


def write_perfetto(
    steps: ReadOnlyList[TraceStep], num_blocks: int, path: str | Path, metadata: Mapping[str, str]
) -> None:  # fmt: skip
    """Write ``steps`` as JSON. ``num_blocks``: the pool's size; ``metadata`` is shown with the whole trace."""
    begin_s = steps[0].began_s if steps else 0.0
    events = [*_names(), *_engine_track(steps, num_blocks), *_sequence_tracks(steps)]
    for event in events:
        if "ts" in event:
            event["ts"] = (event["ts"] - begin_s) * _US
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": metadata}))


def _spans(steps: ReadOnlyList[TraceStep]) -> Iterator[tuple[TraceStep, float]]:
    """Each step and its end, which is drawn no later than the next step's beginning: steps may overlap in time."""
    following = [*(step.began_s for step in steps[1:]), float("inf")]
    for step, next_s in zip(steps, following, strict=False):
        yield step, step.began_s if step.ended_s is None else min(step.ended_s, next_s)


def _engine_track(steps: ReadOnlyList[TraceStep], num_blocks: int) -> Iterator[dict[str, Any]]:
    for step, ended_s in _spans(steps):
        name = f"step {step.index}{_outcome(step, is_last=step is steps[-1])}"
        args = {
            "tokens": step.num_tokens,
            "hit tokens": step.num_hit_tokens,
            "copies": step.num_copies,
            "swapped out": step.num_swapped_out,
            "swapped in": step.num_swapped_in,
            "preempted": list(step.preempted),
        }
        yield _slice(name, 1, 0, step.began_s, ended_s, args)
        used = num_blocks - step.num_free_blocks
        blocks = {"used": used, "shared": step.num_shared_blocks, "cached": step.num_cached_blocks}
        queues = {"running": step.num_running, "waiting": step.num_waiting, "swapped": step.num_swapped}
        for name, values in (("blocks", blocks), ("sequences", queues)):
            yield {"name": name, "ph": "C", "pid": 1, "ts": step.began_s, "args": values}


def _outcome(step: TraceStep, *, is_last: bool) -> str:
    """A note on a step that did not end normally."""
    if step.ended_s is not None:
        return ""
    if not step.num_tokens:
        return " (waits)"  # for a batch to fill
    return " (not ended)" if is_last else " (failed)"


def _sequence_tracks(steps: ReadOnlyList[TraceStep]) -> Iterator[dict[str, Any]]:
    idle: dict[int, tuple[str, float]] = {}  # waiting or swapped sequences, and since when
    for step, ended_s in _spans(steps):
        for event in step.events:
            if not isinstance(event, Arrive | Transition | End):
                continue
            sequence_id = event.sequence_id
            if sequence_id in idle:
                name, since_s = idle.pop(sequence_id)
                yield _slice(name, 2, sequence_id, since_s, step.began_s, {})
            if isinstance(event, Arrive):
                idle[sequence_id] = SequenceState.WAITING.value, step.began_s
                name = f"request {event.request_id}, sequence {sequence_id}"
                yield {"name": "thread_name", "ph": "M", "pid": 2, "tid": sequence_id, "args": {"name": name}}
            elif isinstance(event, Transition) and event.state is not SequenceState.RUNNING:
                idle[sequence_id] = event.state.value, step.began_s
        for sequence_id, num_tokens in step.scheduled.items():
            name = "prefill" if sequence_id in step.prefills else "decode"
            yield _slice(name, 2, sequence_id, step.began_s, ended_s, {"tokens": num_tokens})


def _slice(name: str, process: int, track: int, began_s: float, ended_s: float, args: dict[str, Any]) -> dict[str, Any]:
    duration = (ended_s - began_s) * _US
    return {"name": name, "ph": "X", "pid": process, "tid": track, "ts": began_s, "dur": duration, "args": args}


def _names() -> Iterator[dict[str, Any]]:
    for process, name in ((1, "engine"), (2, "sequences")):
        yield {"name": "process_name", "ph": "M", "pid": process, "tid": 0, "args": {"name": name}}
