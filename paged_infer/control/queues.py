"""The queues, and the blocks that each move of a sequence takes or frees.

    add --> waiting --> running --> (finished)
               ^         |   ^
               +---------+   |        preempted: computed again from the head of the queue, or
                         v   |        swapped out and back, before any waiting sequence is admitted
                        swapped

The queues are in order of arrival. ``draining`` holds finished sequences of a static batch, which keep their blocks
until no sequence runs.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as ReadOnlyList

from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.sequence import Sequence
from paged_infer.control.sequence_state import SequenceState
from paged_infer.control.trace_step import Arrive, End, Transition


class Queues:
    """All unfinished sequences. Every change of a sequence's state goes through here, with its blocks."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.swapped: deque[Sequence] = deque()
        self.draining: list[Sequence] = []
        self.drains_together = False  # whether finished sequences are to drain; set by the policy
        self._num_queued = 0

    @property
    def holders(self) -> list[Sequence]:
        """Sequences that hold blocks of the pool."""
        return self.running + self.draining

    def num_places(self, max_num_seqs: int) -> int:
        """Places that are neither taken nor reserved for beams to be forked."""
        reserved = sum(len(one.to_fork) for one in self.running if one.is_beam)
        return max_num_seqs - len(self.running) - len(self.draining) - reserved

    def num_left_of_share(self, sequence: Sequence, max_num_seqs: int) -> int:
        """How many more samples of the sequence's request may be admitted by its share of the places."""
        if sequence.is_beam or len(sequence.siblings) < 2:
            return max_num_seqs
        draining = sum(one.request_id == sequence.request_id for one in self.draining)
        running = sum(one.state is SequenceState.RUNNING for one in sequence.siblings)
        return sample_share(max_num_seqs) - running - draining

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue new sequences after all waiting ones."""
        for sequence in sequences:
            self._append(sequence)
            self.manager.events.append(Arrive(sequence.sequence_id, sequence.request_id, sequence.num_prompt_tokens))

    def requeue(self, sequences: ReadOnlyList[Sequence]) -> None:
        """Move these waiting sequences to the end of the waiting queue, as if they had just arrived."""
        moved = {*sequences}
        others = [one for one in self.waiting if one not in moved]
        self.waiting.clear()
        self.waiting.extend(others)
        for sequence in sequences:
            self._append(sequence)

    def _append(self, sequence: Sequence) -> None:
        sequence.queue_number = self._num_queued
        self._num_queued += 1
        self.waiting.append(sequence)

    def start(self, sequence: Sequence) -> None:
        """Move a waiting or swapped sequence to the running ones."""
        (self.waiting if sequence.state is SequenceState.WAITING else self.swapped).remove(sequence)
        self._transition(sequence, SequenceState.RUNNING)
        insort(self.running, sequence, key=lambda running: running.queue_number)

    def fork(self, parent: Sequence, child: Sequence, num_tokens: int) -> None:
        """Let a running sequence continue from the first ``num_tokens`` tokens of its sibling ``parent``."""
        self.manager.fork(parent.sequence_id, child.sequence_id, num_tokens)
        child.fork_from(parent, num_tokens, self.manager.block_size)

    def preempt(self, group: ReadOnlyList[Sequence], *, swaps: bool) -> None:
        """Free all blocks of a running sequence group; with ``swaps``, move them to swap space first if it has room."""
        for sequence in group:
            self.running.remove(sequence)
            sequence.num_preemptions += 1
        stored = [(sequence.sequence_id, sequence.num_computed_tokens) for sequence in group]
        if swaps and stored[0][1] and self.manager.swap_out(*stored):
            for sequence in group:
                _insert_by_age(self.swapped, sequence)
                self._transition(sequence, SequenceState.SWAPPED)
        else:
            for sequence in group:
                self.manager.free(sequence.sequence_id)
                self._wait_again(sequence)
        self.release_draining()

    def restart(self, sequence: Sequence) -> None:
        """Free the blocks of a running or swapped sequence and queue it for recomputation."""
        if sequence.state in (SequenceState.RUNNING, SequenceState.SWAPPED):
            self._leave(sequence)
            self._wait_again(sequence)

    def _wait_again(self, sequence: Sequence) -> None:
        sequence.restart()
        _insert_by_age(self.waiting, sequence)
        self.manager.events.append(Transition(sequence.sequence_id, SequenceState.WAITING))

    def _transition(self, sequence: Sequence, state: SequenceState) -> None:
        sequence.transition_to(state)
        self.manager.events.append(Transition(sequence.sequence_id, state))

    def _leave(self, sequence: Sequence) -> None:
        """Remove the sequence from its queue, and free what it holds."""
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            self.manager.free(sequence.sequence_id)
        elif sequence.state is SequenceState.SWAPPED:
            self.swapped.remove(sequence)
            self.manager.swap.drop(sequence.sequence_id)
        else:
            self.waiting.remove(sequence)

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End the sequence, whatever its state. Its blocks are freed immediately, unless its batch drains together.

        Finishing twice changes nothing, except that an abort or an error frees the blocks of a draining sequence.
        """
        is_cut_short = reason in ("abort", "error")
        if sequence.is_finished:
            if is_cut_short and sequence in self.draining:
                self.draining.remove(sequence)
                self.manager.free(sequence.sequence_id)
            return
        if self.drains_together and sequence.state is SequenceState.RUNNING and not is_cut_short:
            self.running.remove(sequence)
            self.draining.append(sequence)
        else:
            self._leave(sequence)
        sequence.finish(reason, stop_reason)
        self.manager.events.append(End(sequence.sequence_id, reason))
        self.release_draining()

    def fail(self, sequence: Sequence, error: str, *, include_finished: bool = False) -> None:
        """End the request of a failed sequence: all of its unfinished samples or beams.

        Its keys and values may be NaN, also in blocks of earlier steps, so all its blocks leave the prefix cache.

        ``include_finished``: the finished ones get this error, too. The failed sequence itself always does.
        """
        for one in sequence.siblings or (sequence,):
            self.manager.forget(one.block_hashes)
            gets_error = include_finished or one is sequence or not one.is_finished
            self.finish(one, "error")
            if gets_error:
                one.finish_reason, one.stop_reason = "error", None
                one.error = f"request {one.request_id!r} failed after {one.num_output_tokens} tokens: {error}"

    def release_draining(self) -> None:
        """Free the blocks of a batch's finished sequences once no sequence runs."""
        if not self.running:
            for sequence in self.draining:
                self.manager.free(sequence.sequence_id)
            self.draining.clear()

    def check_integrity(self) -> None:
        """Raises RuntimeError unless law 2 holds and exactly the running and draining sequences hold blocks."""
        self.manager.check_integrity({s.sequence_id: s.num_computed_tokens for s in self.holders})
        self.manager.swap.check_integrity({s.sequence_id for s in self.swapped})


def _insert_by_age(queue: deque[Sequence], sequence: Sequence) -> None:
    """Insert a sequence before all that arrived later, which is usually the whole queue."""
    place = 0
    for other in queue:
        if other.queue_number > sequence.queue_number:
            break
        place += 1
    queue.insert(place, sequence)


def sample_share(max_num_seqs: int) -> int:
    """The most places that the samples of one request hold at once: three quarters, rounded up; all but one below 4."""
    return max(1, max_num_seqs - max(1, max_num_seqs // 4))
