"""One step while it is being filled: the verbs that a schedule is made of.

    run()      who runs goes on        takes blocks, if need be those of the youngest who has not had its turn yet
    admit()    who waits comes in      never at the cost of anybody who runs

Until the step has succeeded, nothing that was built on it is certain. ``fresh`` lists who would have to begin again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paged_infer.control.block_manager import Allocation, Table
from paged_infer.control.request import Sequence, SequenceState

if TYPE_CHECKING:
    from paged_infer.control.scheduler import Scheduler


class Turn:
    """The step of one index: what is left of its budget, and who computes how many tokens."""

    def __init__(self, scheduler: Scheduler, index: int) -> None:
        self.index = index
        self.budget = scheduler.max_num_batched_tokens  # tokens
        self.scheduled: list[tuple[Sequence, int]] = []
        self.preempted: list[Sequence] = []
        self.fresh: list[Sequence] = []
        self.num_hit_tokens = 0
        self._scheduler = scheduler
        self._manager = scheduler.manager
        self._running = scheduler.running
        self._waiting = scheduler.waiting

    def run(self) -> None:
        """Give every running sequence its tokens, the oldest first."""
        for sequence in tuple(self._running):
            if not self.budget:
                break
            if sequence.state is not SequenceState.RUNNING or sequence.last_step == self.index:
                continue
            num_tokens = min(sequence.num_uncomputed_tokens, self.budget)
            if self._make_room(sequence, num_tokens):
                self._schedule(sequence, num_tokens)

    def admit(self) -> None:
        """Let the head of the queue in while there is budget, a place, and room for all its known tokens."""
        while self._waiting and self.budget and not self.preempted:
            sequence = self._waiting[0]
            if len(self._running) == self._scheduler.max_num_seqs:
                break
            prefix = self._find_prefix(sequence)
            if self._manager.can_allocate(sequence.num_tokens, prefix) is not Allocation.OK:
                break
            self._waiting.popleft()
            self._begin(sequence, prefix)
            num_tokens = min(sequence.num_uncomputed_tokens, self.budget)
            self._manager.grow(sequence.sequence_id, sequence.num_computed_tokens + num_tokens)
            self._schedule(sequence, num_tokens)

    def _find_prefix(self, sequence: Sequence) -> Table:
        """Cached blocks that the sequence can begin with: full ones, and never all of its tokens.

        A request that reports its prompt's logprobs has to compute every row.
        """
        if not self._scheduler.enable_prefix_caching or sequence.params.prompt_logprobs is not None:
            return ()
        block_size = self._manager.block_size
        chain = sequence.hash_chain(block_size)
        return self._manager.find_prefix(chain[: (sequence.num_tokens - 1) // block_size])

    def _begin(self, sequence: Sequence, prefix: Table) -> None:
        sequence.move_to(SequenceState.RUNNING)
        self._running.append(sequence)
        self.fresh.append(sequence)
        self._manager.adopt(sequence.sequence_id, prefix)
        num_hit = len(prefix) * self._manager.block_size
        sequence.num_computed_tokens = num_hit
        self.num_hit_tokens += num_hit
        if not sequence.num_preemptions and not sequence.num_output_tokens:
            sequence.num_cached_tokens = num_hit

    def _schedule(self, sequence: Sequence, num_tokens: int) -> None:
        start = sequence.num_computed_tokens
        self.budget -= num_tokens
        self.scheduled.append((sequence, num_tokens))
        sequence.last_step = self.index
        block_size = self._manager.block_size
        first, end = start // block_size, (start + num_tokens) // block_size
        if first < end and self._scheduler.enable_prefix_caching:
            self._manager.publish(sequence.sequence_id, sequence.hash_chain(block_size), first, end)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for ``num_tokens`` more, at the cost of the youngest; False if that is the sequence itself."""
        while not self._manager.grow(sequence.sequence_id, sequence.num_computed_tokens + num_tokens):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._manager.free(sequence.sequence_id)
        sequence.restart()
        sequence.num_preemptions += 1
        self._scheduler.requeue(sequence)
        self.preempted.append(sequence)
