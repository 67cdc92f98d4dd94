"""Who runs in this step, with how many tokens; who waits; who is preempted.

Continuous batching (Orca, Yu 2022, section 3) over one token budget (Sarathi-Serve, Agrawal 2024, section 4): each
step first gives every decoding sequence its one token, then spends what is left on prompts, the oldest first and cut
to fit. A long prompt so streams in beside running decodes instead of stopping them.

Order is by arrival throughout. When the pool is exhausted the youngest running sequence gives back all its blocks and
waits at the head of the queue, so the oldest always gets through: every request that fits the pool finishes. Swapped
sequences come back before anybody who waits comes in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass

from paged_infer.control.block_manager import BlockManager
from paged_infer.control.request import Sequence, SequenceState
from paged_infer.control.step import BlockMoves, ScheduledSequence, ScheduledStep
from paged_infer.control.turn import Turn, insert_by_age
from paged_infer.params import SampleRow

PREEMPTION_MODES = ("recompute", "swap")


@dataclass(slots=True)
class SchedulerStats:
    steps: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    blocks_copied: int = 0
    blocks_swapped_out: int = 0
    blocks_swapped_in: int = 0


class Scheduler:
    """Chunked continuous batching.

    Args:
        manager: the block tables; the scheduler is the only one to change them.
        max_num_seqs: most sequences running at once (holding blocks), not just in one step.
        max_num_batched_tokens: most tokens computed in one step.
        enable_prefix_caching: let requests that begin alike share the blocks of their beginning.
        preemption_mode: one of ``PREEMPTION_MODES``: a sequence that has to give back its blocks computes them again,
            or has them moved to the manager's swap space and back. Where that is full, it computes them again.
    """

    def __init__(
        self,
        manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        *,
        enable_prefix_caching: bool = True,
        preemption_mode: str = "recompute",
    ) -> None:
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs={max_num_seqs}: must be at least 1")
        if max_num_batched_tokens < 1:
            raise ValueError(f"max_num_batched_tokens={max_num_batched_tokens}: must be at least 1")
        if preemption_mode not in PREEMPTION_MODES:
            known = ", ".join(PREEMPTION_MODES)
            raise ValueError(f"preemption_mode={preemption_mode!r} is not known; known: {known}")
        self.manager = manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.swaps = preemption_mode == "swap"
        self.waiting: deque[Sequence] = deque()
        self.swapped: deque[Sequence] = deque()  # by arrival
        self.running: list[Sequence] = []  # by arrival
        self.stats = SchedulerStats()
        self._turn: Turn | None = None  # the step that is out and has not come back

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.swapped)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue new sequences behind everything that waits."""
        self.waiting.extend(sequences)

    # -- one step ---------------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledStep:
        """Choose the next step's work and give it blocks. ``update`` must follow; a step without one has failed."""
        self.roll_back()
        self.stats.steps += 1
        turn = self._turn = Turn(self, self.stats.steps)
        turn.run()
        turn.resume()
        turn.admit()
        self.stats.preemptions += len(turn.preempted)
        turn.moves, self.manager.moves = self.manager.moves, BlockMoves()
        sequences = [
            self._describe(*item, turn.forks.get(item[0].sequence_id, ())) for item in turn.scheduled
        ]
        return ScheduledStep(turn.index, sequences, turn.moves)

    def _describe(
        self, sequence: Sequence, num_tokens: int, children: ReadOnlyList[Sequence]
    ) -> ScheduledSequence:
        start = sequence.num_computed_tokens
        end = start + num_tokens
        num_prompt_logprobs: int | None = None
        next_prompt_token_ids: ReadOnlyList[int] = ()
        if sequence.params.prompt_logprobs is not None and sequence.sample_index == 0:
            next_prompt_token_ids = sequence.token_ids[start + 1 : min(end + 1, sequence.num_prompt_tokens)]
            num_prompt_logprobs = sequence.params.prompt_logprobs if next_prompt_token_ids else None
        return ScheduledSequence(
            sequence.sequence_id,
            sequence.token_ids[start:end],
            start,
            self.manager.table(sequence.sequence_id),
            sample_row(sequence) if end == len(sequence.token_ids) else None,
            [(child.sequence_id, sample_row(child)) for child in children],
            num_prompt_logprobs,
            next_prompt_token_ids,
        )

    def update(self, step: ScheduledStep, token_ids: Mapping[int, int]) -> list[Sequence]:
        """Take the tokens that the step drew, by sequence id; sequences that they end give back their blocks.

        Returns the sequences that got a token, in the step's order.
        """
        turn, self._turn = self._turn, None
        if turn is None or turn.index != step.index:
            raise RuntimeError(f"step {step.index} is not the one that was scheduled last")
        self.manager.confirm()
        self.stats.prefix_hit_tokens += turn.num_hit_tokens
        self.stats.blocks_copied += len(turn.moves.copies)
        self.stats.blocks_swapped_out += len(turn.moves.swap_outs)
        self.stats.blocks_swapped_in += len(turn.moves.swap_ins)
        grown: list[Sequence] = []
        for sequence, num_tokens in turn.scheduled:
            if not sequence.is_finished:  # aborted while the step was out
                sequence.num_computed_tokens += num_tokens
            for one in (sequence, *turn.forks.get(sequence.sequence_id, ())):
                if one.num_computed_tokens == len(one.token_ids) and not one.is_finished:
                    grown.append(one)
                    ended = one.append(token_ids[one.sequence_id])
                    if ended is not None:
                        self.finish(one, *ended)
        return grown

    def roll_back(self) -> None:
        """The step that is out, if any, has failed, and nobody knows how far it came: forget what was built on it."""
        turn, self._turn = self._turn, None
        if turn is None:
            return
        self.manager.withdraw()
        copies = {destination for _, destination in turn.moves.copies}
        copied = [s for s, _ in turn.scheduled if not copies.isdisjoint(self.manager.table(s.sequence_id))]
        for sequence in {*turn.fresh, *copied, *turn.preempted}:
            if sequence.state in (SequenceState.RUNNING, SequenceState.SWAPPED):
                self._leave(sequence)
                sequence.restart()
                insert_by_age(self.waiting, sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Take the sequence out of whatever queue it stands in, and give back what it holds."""
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            self.manager.free(sequence.sequence_id)
        elif sequence.state is SequenceState.SWAPPED:
            self.swapped.remove(sequence)
            self.manager.swap.drop(sequence.sequence_id)
        else:
            self.waiting.remove(sequence)

    # -- endings ----------------------------------------------------------------------------------------------------

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End the sequence in whatever state it is; its blocks are free at once. Ending twice changes nothing."""
        if sequence.is_finished:
            return
        self._leave(sequence)
        sequence.finish(reason, stop_reason)

    def num_stored_tokens(self, step: ScheduledStep) -> int:
        """Tokens in the pool once ``step`` is computed, those of shared blocks counted once."""
        stored = {sequence.sequence_id: sequence.num_computed_tokens for sequence in self.running}
        stored.update((s.sequence_id, s.num_computed_tokens + s.num_tokens) for s in step.sequences)
        return self.manager.pool.num_used * self.manager.block_size - self.manager.num_empty_slots(stored)

    def check_integrity(self) -> None:
        """Raises RuntimeError unless law 2 holds, the crowd gate too, and exactly the running sequences hold blocks."""
        self.manager.check_integrity({s.sequence_id: s.num_computed_tokens for s in self.running})
        self.manager.swap.check_integrity({s.sequence_id for s in self.swapped})
        if len(self.running) > self.max_num_seqs:
            raise RuntimeError(f"{len(self.running)} sequences run; max_num_seqs={self.max_num_seqs}")


def sample_row(sequence: Sequence) -> SampleRow:
    """How to draw the sequence's next token; the history is in it only where a penalty needs it."""
    params = sequence.params
    num_tokens, num_prompt = len(sequence.token_ids), sequence.num_prompt_tokens
    history = params.has_penalties
    return SampleRow(
        params,
        sequence.seed,
        sequence.sample_index,
        num_tokens,
        num_tokens - num_prompt,
        sequence.end_token_ids if params.min_tokens else (),
        sequence.token_ids[:num_prompt] if history else (),
        sequence.output_token_ids if history else (),
    )
