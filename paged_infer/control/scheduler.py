"""Who runs in this step, with how many tokens; who waits; who is preempted.

Continuous batching (Orca, Yu 2022, section 3) over one token budget (Sarathi-Serve, Agrawal 2024, section 4): each
step first gives every decoding sequence its one token, then spends what is left on prompts, the oldest first and cut
to fit. A long prompt so streams in beside running decodes instead of stopping them.

Order is by arrival throughout. When the pool is exhausted the youngest running sequence gives back all its blocks and
waits at the head of the queue, so the oldest always gets through: every request that fits the pool finishes.

Two things follow from admitting in order, and only while budget is left: no more sequences run than the budget has
tokens, so every decode gets its token in every step; and at most one prompt is partly computed, the youngest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from paged_infer.control.block_manager import Allocation, BlockManager
from paged_infer.control.request import Sequence, SequenceState
from paged_infer.control.step import ScheduledSequence, ScheduledStep
from paged_infer.params import SampleRow


@dataclass(slots=True)
class SchedulerStats:
    preemptions: int = 0
    steps: int = 0


class Scheduler:
    """Chunked continuous batching.

    Args:
        manager: the block tables; the scheduler is the only one to change them.
        max_num_seqs: most sequences running at once (holding blocks), not just in one step.
        max_num_batched_tokens: most tokens computed in one step.
    """

    def __init__(self, manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs={max_num_seqs}: must be at least 1")
        if max_num_batched_tokens < 1:
            raise ValueError(f"max_num_batched_tokens={max_num_batched_tokens}: must be at least 1")
        self.manager = manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by arrival
        self.stats = SchedulerStats()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue new sequences behind everything that waits."""
        self.waiting.extend(sequences)

    # -- one step ---------------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledStep:
        """Choose the next step's work and give it blocks. ``update`` must follow, unless the step fails."""
        budget = self.max_num_batched_tokens
        scheduled: list[tuple[Sequence, int]] = []  # who computes how many tokens
        for sequence in tuple(self.running):
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            if sequence.state is not SequenceState.RUNNING or not self._make_room(sequence, num_tokens):
                break  # preempted, and so are all that are younger
            scheduled.append((sequence, num_tokens))
            budget -= num_tokens
        scheduled += self._admit(budget)
        self.stats.steps += 1
        return ScheduledStep(self.stats.steps, [self._describe(*item) for item in scheduled])

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for ``num_tokens`` more, at the cost of the youngest; False if that is the sequence itself."""
        while not self.manager.grow(sequence.sequence_id, sequence.num_computed_tokens + num_tokens):
            victim = self.running.pop()
            self.manager.free(victim.sequence_id)
            victim.preempt()
            self.waiting.appendleft(victim)  # younger than all that run, older than all that wait
            self.stats.preemptions += 1
            if victim is sequence:
                return False
        return True

    def _admit(self, budget: int) -> list[tuple[Sequence, int]]:
        """Let the head of the queue in while there is budget, a place, and room for all its known tokens."""
        admitted = []
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if self.manager.can_allocate(sequence.num_tokens) is not Allocation.OK:
                break
            self.waiting.popleft()
            sequence.move_to(SequenceState.RUNNING)
            self.running.append(sequence)
            num_tokens = min(sequence.num_uncomputed_tokens, budget)
            self.manager.grow(sequence.sequence_id, num_tokens)
            admitted.append((sequence, num_tokens))
            budget -= num_tokens
        return admitted

    def _describe(self, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        start = sequence.num_computed_tokens
        end = start + num_tokens
        next_prompt_token_ids: list[int] = []
        if sequence.params.prompt_logprobs is not None and sequence.sample_index == 0:
            next_prompt_token_ids = sequence.token_ids[start + 1 : min(end + 1, sequence.num_prompt_tokens)]
        return ScheduledSequence(
            sequence_id=sequence.sequence_id,
            token_ids=sequence.token_ids[start:end],
            num_computed_tokens=start,
            block_table=self.manager.table(sequence.sequence_id),
            sample=sample_row(sequence) if end == sequence.num_tokens else None,
            num_prompt_logprobs=sequence.params.prompt_logprobs if next_prompt_token_ids else None,
            next_prompt_token_ids=next_prompt_token_ids,
        )

    def update(self, step: ScheduledStep, token_ids: Mapping[int, int]) -> list[Sequence]:
        """Take the tokens that the step drew, by sequence id; sequences that they end give back their blocks.

        Returns the sequences that got a token, in the step's order.
        """
        running = {sequence.sequence_id: sequence for sequence in self.running}
        grown = []
        for item in step.sequences:
            sequence = running[item.sequence_id]
            sequence.num_computed_tokens += item.num_tokens
            if item.sample is None:
                continue
            grown.append(sequence)
            ended = sequence.append(token_ids[item.sequence_id])
            if ended is not None:
                self.finish(sequence, *ended)
        return grown

    # -- endings ----------------------------------------------------------------------------------------------------

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End the sequence in whatever state it is; its blocks are free at once. Ending twice changes nothing."""
        if sequence.is_finished:
            return
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            self.manager.free(sequence.sequence_id)
        else:
            self.waiting.remove(sequence)
        sequence.finish(reason, stop_reason)

    def check_integrity(self) -> None:
        """Raises RuntimeError unless law 2 holds, the crowd gate too, and exactly the running sequences hold blocks."""
        self.manager.check_integrity({s.sequence_id: s.num_computed_tokens for s in self.running})
        if len(self.running) > self.max_num_seqs:
            raise RuntimeError(f"{len(self.running)} sequences run; max_num_seqs={self.max_num_seqs}")


def sample_row(sequence: Sequence) -> SampleRow:
    """How to draw the sequence's next token; the history is in it only where a penalty needs it."""
    params = sequence.params
    history = params.has_penalties
    return SampleRow(
        params=params,
        seed=sequence.seed,
        sample_index=sequence.sample_index,
        position=sequence.num_tokens,
        num_output_tokens=sequence.num_output_tokens,
        end_token_ids=sequence.end_token_ids if params.min_tokens else (),
        prompt_token_ids=sequence.token_ids[: sequence.num_prompt_tokens] if history else (),
        output_token_ids=sequence.output_token_ids if history else (),
    )
