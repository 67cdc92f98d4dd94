"""What happened in every step: kept as events, from which the pool of any step is built again.

    ("arrive", id, request_id, num_prompt_tokens)     ("run", id)   ("wait", id)   ("swap", id)   ("end", id, reason)
    ("hold", id, first, blocks, hits)                 from place ``first`` on its table is ``blocks``; those in ``hits``
                                                      were somebody's or cached, all others free
    ("free", id)                                      its table is empty
    ("adopt", id, num_tokens)                         it begins with so many tokens that the prefix cache had
    ("fork", id, parent_id, num_tokens)               ... or that another sample of its request has stored
    ("publish", block)   ("withdraw", block)          it can be found by its hash, or no longer

A step's events are those since the step before it: what its predecessor's end set free, and what it took itself.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paged_infer.control.blocks.pool import BlockPool

if TYPE_CHECKING:
    from paged_infer.control.scheduler import Scheduler
    from paged_infer.control.step_plan import StepPlan

Event = tuple[Any, ...]
_US = 1e6  # Perfetto counts microseconds


@dataclass(slots=True, eq=False)
class TraceStep:
    """One step. Times in seconds on the caller's clock; queues and blocks as they were while it ran.

    ``ended_s`` is None for a step that failed, or is still out, or was empty because a batch waits to fill.
    """

    index: int
    began_s: float
    sequence_ids: array[int]
    token_counts: array[int]  # one for each of ``sequence_ids``
    prefills: tuple[int, ...]  # those of ``sequence_ids`` that were not decoding
    preempted: tuple[int, ...]
    num_running: int
    num_waiting: int
    num_swapped: int
    num_free_blocks: int
    num_cached_blocks: int  # those that can be found by hash, free or held
    num_shared_blocks: int
    num_looked_up_tokens: int  # of the sequences that came in
    num_hit_tokens: int  # of these, found in the prefix cache
    num_copies: int
    num_swapped_out: int
    num_swapped_in: int
    num_evictions: int  # since the engine was made
    events: tuple[Event, ...]
    ended_s: float | None = None
    rejected: dict[int, int] = field(default_factory=dict)  # how many of a sequence's tokens were drafts in vain

    @property
    def scheduled(self) -> dict[int, int]:
        """How many tokens of each sequence it computed."""
        return dict(zip(self.sequence_ids, self.token_counts, strict=True))

    @property
    def num_tokens(self) -> int:
        return sum(self.token_counts)


@dataclass(slots=True, eq=False)
class Replay:
    """The pool, the block tables and what everybody was doing, as they were while one step ran."""

    pool: BlockPool
    tables: dict[int, tuple[int, ...]] = field(default_factory=dict)
    states: dict[int, str] = field(default_factory=dict)  # "wait", "run", "swap"; who has ended is not in it
    computed: dict[int, int] = field(default_factory=dict)  # tokens of each stored before this step adds to them

    def apply(self, event: Event) -> None:
        kind, subject = event[:2]
        if kind == "hold":
            self._hold(*event[1:])
        elif kind in ("adopt", "fork"):
            self.computed[subject] = event[-1]
        elif kind == "free":
            for block in reversed(self.tables.pop(subject, ())):
                self.pool.release(block)
            if subject not in self.states:
                self.computed.pop(subject, None)
        elif kind == "publish":
            self.pool.publish(subject, b"%d" % subject)  # what it holds is not known here, only that it can be found
        elif kind == "withdraw":
            self.pool.drop_hash(subject)
        elif kind == "end":
            self.states.pop(subject, None)
            if subject not in self.tables:  # else its batch leaves together, and it keeps what it has
                self.computed.pop(subject, None)
        else:
            self.states[subject] = "wait" if kind == "arrive" else kind
            if self.states[subject] == "wait":
                self.computed[subject] = 0

    def finish(self, step: TraceStep) -> None:
        """What the step computed is stored, unless it failed."""
        if step.ended_s is not None:
            for sequence_id, num_tokens in step.scheduled.items():
                if sequence_id in self.computed:
                    self.computed[sequence_id] += num_tokens - step.rejected.get(sequence_id, 0)

    def _hold(self, sequence_id: int, first: int, blocks: tuple[int, ...], hits: tuple[int, ...]) -> None:
        for block in hits:
            self.pool.share(block)
        for block in blocks:
            if block not in hits and self.pool.take() != block:
                raise RuntimeError(f"the trace says that block {block} was taken, and the pool had another one next")
        table = self.tables.get(sequence_id, ())
        for block in reversed(table[first:]):
            self.pool.release(block)
        self.tables[sequence_id] = table[:first] + blocks


class Trace:
    """Every step since the engine was made. ``num_blocks``: the pool's size."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = 0  # tokens; the manager's, known once a step is recorded
        self.steps: list[TraceStep] = []

    def record(self, scheduler: Scheduler, plan: StepPlan, events: list[Event]) -> TraceStep:
        """Keep a step that has just been scheduled, with what has changed since the one before."""
        pool, transfers = scheduler.manager.pool, plan.transfers
        self.block_size = scheduler.manager.block_size
        step = TraceStep(
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
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_swapped=len(scheduler.swapped),
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_hashed,
            num_shared_blocks=pool.num_shared,
            num_looked_up_tokens=plan.num_looked_up_tokens,
            num_hit_tokens=plan.num_hit_tokens,
            num_copies=len(transfers.copies),
            num_swapped_out=len(transfers.swap_outs),
            num_swapped_in=len(transfers.swap_ins),
            num_evictions=pool.num_evictions,
            events=tuple(events),
        )
        self.steps.append(step)
        return step

    @property
    def hit_rate(self) -> float:
        """Share of the tokens of newcomers that the prefix cache had; 0 while nobody came.

        Who came in with a step that failed comes in again, and counts once.
        """
        num_hits, num_looked_up = self.hits
        return num_hits / num_looked_up if num_looked_up else 0.0

    @property
    def hits(self) -> tuple[int, int]:
        """Tokens of newcomers that the prefix cache had, and all that were looked up."""
        ended = [step for step in self.steps if step.ended_s is not None]
        return sum(step.num_hit_tokens for step in ended), sum(step.num_looked_up_tokens for step in ended)

    def replay(self, place: int) -> Replay:
        """Everything as it was while ``steps[place]`` ran."""
        last = self.steps[place]
        return next(replay for step, replay in zip(self.steps, self.replays(), strict=False) if step is last)

    def replays(self) -> Iterator[Replay]:
        """Step after step, everything as it was while it ran: one object, which the next step changes."""
        replay = Replay(BlockPool(self.num_blocks))
        for step in self.steps:
            for event in step.events:
                replay.apply(event)
            yield replay
            replay.finish(step)

    def to_perfetto(self, path: str | Path) -> None:
        """Write the trace as JSON that https://ui.perfetto.dev opens: a track for the engine, one for each sequence."""
        begin_s = self.steps[0].began_s if self.steps else 0.0
        events = [*_names(), *self._engine_track(), *self._sequence_tracks()]
        for event in events:
            if "ts" in event:
                event["ts"] = (event["ts"] - begin_s) * _US
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    def _spans(self) -> Iterator[tuple[TraceStep, float]]:
        """Each step and when it ended; where the next one was planned meanwhile, it is drawn until then."""
        following = [*(step.began_s for step in self.steps[1:]), float("inf")]
        for step, next_s in zip(self.steps, following, strict=False):
            yield step, step.began_s if step.ended_s is None else min(step.ended_s, next_s)

    def _engine_track(self) -> Iterator[dict[str, Any]]:
        for step, ended_s in self._spans():
            name = f"step {step.index}{self._outcome(step)}"
            args = {
                "tokens": step.num_tokens,
                "hit tokens": step.num_hit_tokens,
                "copies": step.num_copies,
                "swapped out": step.num_swapped_out,
                "swapped in": step.num_swapped_in,
                "preempted": list(step.preempted),
            }
            yield _slice(name, 1, 0, step.began_s, ended_s, args)
            used = self.num_blocks - step.num_free_blocks
            blocks = {"used": used, "shared": step.num_shared_blocks, "cached": step.num_cached_blocks}
            queues = {"running": step.num_running, "waiting": step.num_waiting, "swapped": step.num_swapped}
            for name, values in (("blocks", blocks), ("sequences", queues)):
                yield {"name": name, "ph": "C", "pid": 1, "ts": step.began_s, "args": values}

    def _outcome(self, step: TraceStep) -> str:
        """What there is to say of a step that did not end as steps do."""
        if step.ended_s is not None:
            return ""
        if not step.num_tokens:
            return " (waits)"  # for a batch to fill
        return " (not ended)" if step is self.steps[-1] else " (failed)"

    def _sequence_tracks(self) -> Iterator[dict[str, Any]]:
        idle: dict[int, tuple[str, float]] = {}  # who waits or is swapped, and since when
        for step, ended_s in self._spans():
            for kind, subject, *rest in step.events:
                if kind in ("run", "wait", "swap", "end") and subject in idle:
                    name, since_s = idle.pop(subject)
                    yield _slice(name, 2, subject, since_s, step.began_s, {})
                if kind in ("arrive", "wait", "swap"):
                    idle[subject] = "swapped" if kind == "swap" else "waiting", step.began_s
                if kind == "arrive":
                    name = f"request {rest[0]}, sequence {subject}"
                    yield {"name": "thread_name", "ph": "M", "pid": 2, "tid": subject, "args": {"name": name}}
            for sequence_id, num_tokens in step.scheduled.items():
                name = "prefill" if sequence_id in step.prefills else "decode"
                yield _slice(name, 2, sequence_id, step.began_s, ended_s, {"tokens": num_tokens})


def _slice(name: str, process: int, track: int, began_s: float, ended_s: float, args: dict[str, Any]) -> dict[str, Any]:
    duration = (ended_s - began_s) * _US
    return {"name": name, "ph": "X", "pid": process, "tid": track, "ts": began_s, "dur": duration, "args": args}


def _names() -> Iterator[dict[str, Any]]:
    for process, name in ((1, "engine"), (2, "sequences")):
        yield {"name": "process_name", "ph": "M", "pid": process, "tid": 0, "args": {"name": name}}
