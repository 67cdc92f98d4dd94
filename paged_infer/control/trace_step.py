"""What a trace keeps of a step: its counts, and the events from which the pool can be rebuilt.

The events of a step are those since the step before it: what the end of that step freed, and what this one took.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from paged_infer.control.sequence_state import SequenceState


class Arrive(NamedTuple):  # a new sequence waits
    sequence_id: int
    request_id: str
    num_prompt_tokens: int


class Transition(NamedTuple):  # it is now running, swapped, or waiting again
    sequence_id: int
    state: SequenceState


class End(NamedTuple):  # it has finished
    sequence_id: int
    reason: str


class Hold(NamedTuple):  # its block table is ``blocks`` from entry ``first`` on; all but ``hits`` were free before
    sequence_id: int
    first: int
    blocks: tuple[int, ...]
    hits: tuple[int, ...]


class Free(NamedTuple):  # its block table is empty
    sequence_id: int


class Adopt(NamedTuple):  # it starts with this many tokens from the prefix cache
    sequence_id: int
    num_tokens: int


class Fork(NamedTuple):  # it starts with this many tokens that another sequence of its request has stored
    sequence_id: int
    parent_id: int
    num_tokens: int


class Publish(NamedTuple):  # the block can be found by its hash
    block: int


class DropHash(NamedTuple):  # and no longer can
    block: int


Event = Arrive | Transition | End | Hold | Free | Adopt | Fork | Publish | DropHash


@dataclass(slots=True, eq=False)
class TraceStep:
    """One step. Times in seconds on the caller's clock; queues and blocks as they were while it ran.

    ``ended_s`` is None for a step that failed, is still in flight, or was empty because a batch waits to fill.
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
    num_cached_blocks: int  # blocks with a hash, free or held
    num_shared_blocks: int
    num_looked_up_tokens: int  # of the sequences admitted
    num_hit_tokens: int  # of these, found in the prefix cache
    num_copies: int
    num_swapped_out: int
    num_swapped_in: int
    num_evictions: int  # since the engine was created
    events: tuple[Event, ...]
    ended_s: float | None = None
    rejected: dict[int, int] = field(default_factory=dict)  # drafts rejected, by sequence id
    expert_load: list[list[int]] = field(default_factory=list)  # see StepResult

    @property
    def scheduled(self) -> dict[int, int]:
        """How many tokens of each sequence it computed."""
        return dict(zip(self.sequence_ids, self.token_counts, strict=True))

    @property
    def num_tokens(self) -> int:
        return sum(self.token_counts)
