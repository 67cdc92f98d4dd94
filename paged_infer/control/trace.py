"""A record of every step, from which the pool and the queues of any step can be rebuilt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from paged_infer.control import trace_step
from paged_infer.control.blocks.pool import BlockPool
from paged_infer.control.perfetto import write_perfetto
from paged_infer.control.sequence_state import SequenceState
from paged_infer.control.trace_step import Event, TraceStep


@dataclass(slots=True, eq=False)
class Replay:
    """The pool, the block tables and the state of each sequence, as they were while one step ran."""

    pool: BlockPool
    tables: dict[int, tuple[int, ...]] = field(default_factory=dict)
    states: dict[int, SequenceState] = field(default_factory=dict)  # without finished sequences
    computed: dict[int, int] = field(default_factory=dict)  # tokens of each stored before this step adds to them

    def apply(self, event: Event) -> None:
        match event:
            case trace_step.Hold():
                self._hold(*event)
            case trace_step.Free(sequence_id):
                for block in reversed(self.tables.pop(sequence_id, ())):
                    self.pool.release(block)
                if sequence_id not in self.states:
                    self.computed.pop(sequence_id, None)
            case trace_step.Adopt(sequence_id, num_tokens) | trace_step.Fork(sequence_id, _, num_tokens):
                self.computed[sequence_id] = num_tokens
            case trace_step.Publish(block):
                self.pool.publish(block, b"%d" % block)  # a stand-in: the trace does not keep the hash itself
            case trace_step.DropHash(block):
                self.pool.drop_hash(block)
            case trace_step.Arrive(sequence_id):
                self._enter(sequence_id, SequenceState.WAITING)
            case trace_step.Transition(sequence_id, state):
                self._enter(sequence_id, state)
            case trace_step.End(sequence_id):
                self.states.pop(sequence_id, None)
                if sequence_id not in self.tables:  # else its batch drains together, and it keeps its blocks
                    self.computed.pop(sequence_id, None)

    def finish(self, step: TraceStep) -> None:
        """Count the tokens that the step computed as stored, unless it failed."""
        if step.ended_s is not None:
            for sequence_id, num_tokens in step.scheduled.items():
                if sequence_id in self.computed:
                    self.computed[sequence_id] += num_tokens - step.rejected.get(sequence_id, 0)

    def _enter(self, sequence_id: int, state: SequenceState) -> None:
        self.states[sequence_id] = state
        if state is SequenceState.WAITING:
            self.computed[sequence_id] = 0

    def _hold(self, sequence_id: int, first: int, blocks: tuple[int, ...], hits: tuple[int, ...]) -> None:
        for block in hits:
            self.pool.share(block)
        for block in blocks:
            if block not in hits and (taken := self.pool.take()) != block:
                raise RuntimeError(f"the trace takes block {block} where the replayed pool takes block {taken}")
        table = self.tables.get(sequence_id, ())
        for block in reversed(table[first:]):
            self.pool.release(block)
        self.tables[sequence_id] = table[:first] + blocks


class Trace:
    """Every step since the engine was created.

    Args:
        num_blocks: the pool's size.
        kv_cache_dtype: how its keys and values are stored, by name.
    """

    def __init__(self, num_blocks: int, kv_cache_dtype: str = "float32") -> None:
        self.num_blocks, self.kv_cache_dtype = num_blocks, kv_cache_dtype
        self.block_size = 0  # tokens; set by the scheduler
        self.steps: list[TraceStep] = []

    @property
    def hit_rate(self) -> float:
        """Share of the looked-up tokens that the prefix cache had; 0 while none was looked up.

        A sequence admitted by a step that failed is admitted again, and counts once.
        """
        num_hits, num_looked_up = self.hits
        return num_hits / num_looked_up if num_looked_up else 0.0

    @property
    def hits(self) -> tuple[int, int]:
        """Tokens of admitted sequences that the prefix cache had, and all that were looked up."""
        ended = [step for step in self.steps if step.ended_s is not None]
        return sum(step.num_hit_tokens for step in ended), sum(step.num_looked_up_tokens for step in ended)

    @property
    def expert_load(self) -> list[list[int]]:
        """Of each layer with experts, the tokens that each expert computed in all steps; empty without experts."""
        steps = [step.expert_load for step in self.steps if step.expert_load]
        return [[sum(of_steps) for of_steps in zip(*layer, strict=True)] for layer in zip(*steps, strict=True)]

    def replay(self, place: int) -> Replay:
        """Pool, tables and states while ``steps[place]`` ran."""
        last = self.steps[place]
        return next(replay for step, replay in zip(self.steps, self.replays(), strict=False) if step is last)

    def replays(self) -> Iterator[Replay]:
        """The same for each step in turn: one object, which the next step changes."""
        replay = Replay(BlockPool(self.num_blocks))
        for step in self.steps:
            for event in step.events:
                replay.apply(event)
            yield replay
            replay.finish(step)

    def to_perfetto(self, path: str | Path) -> None:
        """Write the trace as JSON that https://ui.perfetto.dev opens: a track for the engine, one for each sequence."""
        write_perfetto(self.steps, self.num_blocks, path, {"kv_cache_dtype": self.kv_cache_dtype})
