"""What a step being planned has left: places, budget and blocks, and how a sequence is given its share of them.

The methods of ``StepPlan``, which policies call, are made of these.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass

from paged_infer.control.blocks.manager import SwapIn, Table
from paged_infer.control.queues import Queues
from paged_infer.control.sequence import Sequence
from paged_infer.control.sequence_state import SequenceState

Victim = Callable[[ReadOnlyList[Sequence]], Sequence]
"""Of the running sequences, in order of arrival, the one that gives back its blocks when another needs them."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a step may do. ``swaps``: preempted sequences go to swap space. ``chunks_prompts``: see ``Policy``."""

    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    swaps: bool
    chunks_prompts: bool


class StepBlocks:
    """The state of a ``StepPlan``, whose attributes are described there."""

    def __init__(
        self, queues: Queues, limits: StepLimits, index: int, now: float, victim: Victim = lambda running: running[-1]
    ) -> None:
        self.index = index
        self.victim = victim  # of the running sequences; by default the youngest
        self.now = now
        self.resume_at_s: float | None = None
        self.max_num_seqs = limits.max_num_seqs
        self.budget = limits.max_num_batched_tokens
        self.running = queues.running
        self.waiting = queues.waiting
        self.swapped = queues.swapped
        self.scheduled: list[tuple[Sequence, int]] = []
        self.forks: dict[int, list[Sequence]] = {}  # by the id of the sequence that computes their beginning
        self.drafts: dict[int, list[int]] = {}  # by sequence id; see control.speculation
        self.preempted: list[Sequence] = []
        self.admitted: list[Sequence] = []  # admitted, resumed or forked: to restart if the step fails
        self.transfers = queues.manager.transfers  # kept here in case planning fails midway
        self.num_hit_tokens = 0
        self.num_looked_up_tokens = 0
        self._closed = False  # to admissions, because a sequence was preempted
        self._queues = queues
        self._limits = limits
        self._manager = queues.manager

    def _has_next(self, sequence: Sequence) -> bool:
        """Whether it has a token to compute: not an idle beam, nor one that waits for its last token to be read."""
        is_done = sequence.num_placeholders and sequence.is_length_capped
        return sequence.num_computed_tokens != len(sequence.token_ids) and not is_done

    # -- capacity ---------------------------------------------------------------------------------------------------

    def _head(self) -> Sequence | None:
        """The first sequence of the queue that may be admitted, or None.

        Skips sequences to be forked from a running sibling, and samples of a request that holds its full share.
        """
        passed: set[str] = set()
        for sequence in self.waiting:
            if sequence.request_id in passed:
                continue
            leader = sequence.leader  # a policy may have put another sample first
            if leader.state is SequenceState.WAITING and self._queues.num_left_of_share(leader, self.max_num_seqs) > 0:
                return leader
            passed.add(sequence.request_id)
        return None

    def _has_place(self, group: ReadOnlyList[Sequence]) -> bool:
        """Whether there are places for the group and for the beams to be forked from it."""
        wanted = len(group) + (len(group[0].to_fork) if group[0].is_beam else 0)
        return wanted <= self._queues.num_places(self.max_num_seqs) or not (self.running or self._queues.draining)

    def _fits(self, num_tokens: int) -> bool:
        """Whether the budget has room for these tokens of an admission, or for some if prompts may be chunked."""
        return self._limits.chunks_prompts or num_tokens <= self.budget

    def _num_next(self, sequence: Sequence, most: int) -> int:
        """How many tokens it computes next: up to the tokens that others fork from, if those are still to come."""
        end = len(sequence.token_ids)
        if sequence.num_common_tokens > sequence.num_computed_tokens and sequence.to_fork:
            end = sequence.num_common_tokens
        return min(end - sequence.num_computed_tokens, most)

    def _num_tokens_with_forks(self, sequence: Sequence) -> int:
        """Tokens that fill as many blocks as the sequence and, without the common ones, its beams to be forked.

        Samples do not count: they are forked later, if there is room.
        """
        forks, block_size = sequence.to_fork, self._manager.block_size
        if not forks or not sequence.is_beam:
            return sequence.num_tokens
        num_common = sequence.num_common_tokens // block_size
        own = sum(self._manager.blocks_for(fork.num_tokens) - num_common for fork in forks)
        return (self._manager.blocks_for(sequence.num_tokens) + own) * block_size

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Reserve blocks for ``num_tokens`` more, preempting the victims if necessary; False if that does not help."""
        start = sequence.num_computed_tokens
        while not self._manager.reserve(sequence.sequence_id, start, start + num_tokens):
            victims = list(self.victim(self.running).sequence_group)
            if any(victim.last_step == self.index for victim in victims):
                return False  # they are scheduled already; in the next step this sequence goes first
            self._preempt(victims)
            if sequence in victims:
                return False
        return True

    def _preempt(self, group: ReadOnlyList[Sequence]) -> None:
        self.preempted += group
        self._queues.preempt(group, swaps=self._limits.swaps)
        # A swap-in comes before a copy of the step, which may still have to read a block that is free now.
        self._closed = bool(self.running)

    # -- blocks and tokens ------------------------------------------------------------------------------------------

    def _chain(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the sequence's full blocks, to find them by; none without prefix caching or when it is retried."""
        is_cached = self._limits.enable_prefix_caching and not sequence.is_retried
        return sequence.hash_chain(self._manager.block_size) if is_cached else []

    def _swap_in_of(self, sequence: Sequence) -> SwapIn:
        num_stored = sequence.num_computed_tokens
        chain = self._chain(sequence)[: num_stored // self._manager.block_size]
        return SwapIn(sequence.sequence_id, chain, num_stored, sequence.num_tokens)

    def _find_prefix(self, sequence: Sequence) -> Table:
        """Cached full blocks that the sequence can start with, but never all of its tokens.

        Excludes blocks after the tokens that others fork from: a block with a hash is never written. A request that
        reports its prompt's logprobs has to compute every row.
        """
        if sequence.params.prompt_logprobs is not None and sequence.sample_index == 0:
            return ()
        chain = self._chain(sequence)
        most = min(sequence.num_tokens - 1, sequence.num_common_tokens or sequence.num_tokens)
        return self._manager.find_prefix(chain[: most // self._manager.block_size])

    def _adopt(self, sequence: Sequence, prefix: Table) -> None:
        self._manager.adopt(sequence.sequence_id, prefix)
        num_hit = len(prefix) * self._manager.block_size
        sequence.num_computed_tokens = num_hit
        sequence.has_hits |= num_hit > 0
        self.num_hit_tokens += num_hit
        self.num_looked_up_tokens += sequence.num_tokens
        if not (sequence.num_preemptions or sequence.num_output_tokens or sequence.is_retried):
            sequence.num_cached_tokens = num_hit

    def _start(self, sequence: Sequence) -> None:
        self._queues.start(sequence)
        self.admitted.append(sequence)
        if sequence.first_scheduled_s is None:
            sequence.first_scheduled_s = self.now

    def _schedule_first(self, sequence: Sequence) -> None:
        """Schedule a sequence that has just started, and that there is room for."""
        start, num_tokens = sequence.num_computed_tokens, self._num_next(sequence, self.budget)
        self._manager.reserve(sequence.sequence_id, start, start + num_tokens)
        self._schedule(sequence, num_tokens)

    def _schedule(self, sequence: Sequence, num_tokens: int) -> None:
        start = sequence.num_computed_tokens
        end = start + num_tokens
        self.budget -= num_tokens
        self.scheduled.append((sequence, num_tokens))
        sequence.last_step = self.index
        block_size = self._manager.block_size
        if start // block_size < end // block_size:
            self.publish(sequence, start, end)
        if sequence.num_common_tokens and end >= sequence.num_common_tokens and sequence.leader is sequence:
            self._fork(sequence)

    def publish(self, sequence: Sequence, start: int, end: int) -> None:
        """Publish the blocks that are full once tokens ``start`` to ``end`` are stored, as far as they are known."""
        first, last = start // self._manager.block_size, end // self._manager.block_size
        if first < last and self._limits.enable_prefix_caching:
            chain = sequence.hash_chain(self._manager.block_size)
            self._manager.publish(sequence.sequence_id, chain, first, min(last, len(chain)))

    def _fork(self, sequence: Sequence) -> None:
        """Fork the siblings that wait for this sequence: all beams, or as many samples as there is room for."""
        children = sequence.to_fork
        if not sequence.is_beam:
            share = self._queues.num_left_of_share(sequence, self.max_num_seqs)
            places = min(self._queues.num_places(self.max_num_seqs), share)
            # In the next step each writes to a block of its own, so each needs a spare one.
            room = 0 if self._closed or self.swapped else max(0, min(places, self._manager.num_spare_blocks))
            children, rest = children[:room], children[room:]
            self._queues.requeue(rest)
        self.forks[sequence.sequence_id] = children
        for child in children:
            self._start(child)
            self._queues.fork(sequence, child, sequence.num_common_tokens)
            child.last_step = self.index
