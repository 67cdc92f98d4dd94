"""The queues, and one step after the other: schedule, and settle with what was drawn.

    add --> waiting --> running --> (finished)
               ^         |   ^
               +---------+   |        preempted: computed again from the head of the queue, or
                         v   |        swapped out and back, before anybody who waits comes in
                        swapped

All queues are in order of arrival. The policy decides which sequences run in a step, and with how many tokens, by the
methods of a ``StepPlan``. When the pool is exhausted the youngest running sequence gives back all its blocks, so the
oldest always gets through: every request that fits the pool finishes. Beams of one search give theirs back together.

The samples of one request hold a limited share of ``max_num_seqs`` (``sample_share``). Whenever some of them are
admitted, the rest move to the end of the waiting queue, so a request with many samples does not starve others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass

from paged_infer.control.beam_search import go_on
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.policies import Chunked, Policy
from paged_infer.control.request import Sequence, SequenceState
from paged_infer.control.speculation import Proposer
from paged_infer.control.step import BlockTransfers, ScheduledStep, StepResult
from paged_infer.control.step_entries import describe
from paged_infer.control.step_plan import StepPlan, insert_by_age
from paged_infer.control.trace import Trace

PREEMPTION_MODES = ("recompute", "swap")


@dataclass(slots=True)
class SchedulerStats:
    steps: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0  # of those that came in: what could have been a hit
    blocks_copied: int = 0
    blocks_swapped_out: int = 0
    blocks_swapped_in: int = 0
    num_drafts: int = 0  # times that a sequence had drafts in a step
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # tokens gained by them: those of a step beyond the first

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were accepted; 0 while none was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0


class Scheduler:
    """Decides each step, and keeps the books on everything that is under way.

    Args:
        manager: the block tables; the scheduler is the only one to change them.
        max_num_seqs: most sequences running at once (holding blocks), not just in one step.
        max_num_batched_tokens: most tokens computed in one step.
        enable_prefix_caching: let requests that begin alike share the blocks of their beginning.
        preemption_mode: one of ``PREEMPTION_MODES``: a sequence that has to give back its blocks computes them again,
            or has them moved to the manager's swap space and back. Where that is full, it computes them again.
        policy: what a step is made of; ``Chunked()`` if None.
        proposer: drafts for those who decode, if given. A step with drafts must be settled before the next is planned.
        trace: keeps a record of every step, if given.
    """

    def __init__(
        self,
        manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        *,
        enable_prefix_caching: bool = True,
        preemption_mode: str = "recompute",
        policy: Policy | None = None,
        proposer: Proposer | None = None,
        trace: Trace | None = None,
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
        self.policy = policy or Chunked()
        self.proposer = proposer
        self.trace = trace
        self.swaps = preemption_mode == "swap"
        self.waiting: deque[Sequence] = deque()
        self.swapped: deque[Sequence] = deque()  # by arrival
        self.running: list[Sequence] = []  # by arrival
        self.draining: list[Sequence] = []  # ended, and keeping their blocks until nobody runs
        self.stats = SchedulerStats()
        self._num_queued = 0
        self._turn: StepPlan | None = None  # the step that was scheduled last, until it is under way
        self._under_way: deque[StepPlan] = deque()  # whose tokens are not known yet

    @property
    def has_work(self) -> bool:
        """Whether there is anybody to plan for: not those who only wait for their last token to be read."""
        return bool(self.waiting or self.swapped) or any(not one.is_length_capped for one in self.running)

    @property
    def is_under_way(self) -> bool:
        """Whether a step has been begun whose tokens are not known yet."""
        return bool(self._under_way)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue new sequences behind everything that waits."""
        for one in sequences:
            self._append(one)
            event = ("arrive", one.sequence_id, one.request_id, one.num_prompt_tokens)
            self.manager.events.append(event)

    def requeue(self, sequences: ReadOnlyList[Sequence]) -> None:
        """Move these waiting sequences to the end of the waiting queue, as if they had just arrived."""
        moved = {*sequences}
        others = [one for one in self.waiting if one not in moved]
        self.waiting.clear()
        self.waiting.extend(others)
        for one in sequences:
            self._append(one)

    def _append(self, sequence: Sequence) -> None:
        sequence.queue_number = self._num_queued
        self._num_queued += 1
        self.waiting.append(sequence)

    # -- one step ---------------------------------------------------------------------------------------------------

    def schedule(self, now: float = 0.0) -> ScheduledStep:
        """Choose the next step's work and give it blocks. ``advance`` and ``settle`` must follow.

        To plan while the step before is still being computed, tell of it by ``advance`` first, and by ``settle`` when
        its tokens are known. Its sequences then go on with tokens that are pending.

        ``now``: the time, in seconds. Policies that delay something look at it, and sequences keep when they came in.
        """
        if self._turn is not None:
            self.roll_back()
        self.stats.steps += 1
        plan = self._turn = StepPlan(self, self.stats.steps, now)
        self.policy.plan(plan)
        if not plan.scheduled and plan.resume_at_s is None and not self._under_way:
            Chunked().plan(plan)  # whom a policy forgets, say in swap space, would else be there for ever
        plan.speculate()
        self.stats.preemptions += len(plan.preempted)
        self.manager.transfers = BlockTransfers()
        events, self.manager.events = self.manager.events, []
        if self.trace is not None:
            plan.traced = self.trace.record(self, plan, events)
        forks, drafts = plan.forks, plan.drafts
        sequences = [
            describe(
                s, n, self.manager.table(s.sequence_id), forks.get(s.sequence_id, ()), drafts.get(s.sequence_id, ())
            )
            for s, n in plan.scheduled
        ]
        return ScheduledStep(plan.index, sequences, plan.transfers, plan.resume_at_s)

    def advance(self, step: ScheduledStep) -> None:
        """The step is under way: its tokens count as computed, and those that it draws as pending."""
        plan, self._turn = self._turn, None
        if plan is None or plan.index != step.index:
            raise RuntimeError(f"step {step.index} is not the one that was scheduled last")
        plan.num_published = self.manager.num_uncommitted - sum(out.num_published for out in self._under_way)
        for sequence, num_tokens in plan.scheduled:
            if sequence.state is not SequenceState.FINISHED:  # by an abort, while the step was out
                sequence.num_computed_tokens += num_tokens - len(plan.drafts.get(sequence.sequence_id, ()))
                if sequence.num_computed_tokens == len(sequence.token_ids):
                    if sequence.search is None:
                        sequence.append_placeholder()
                        plan.drawing.append(sequence)
                    else:
                        plan.ranking.append(sequence)
            if sequence.sequence_id in plan.forks:
                sequence.num_common_tokens = 0
            for child in plan.forks.get(sequence.sequence_id, ()):
                child.num_common_tokens = 0
                if child.search is None and not child.is_finished:
                    child.append_placeholder()
                    plan.drawing.append(child)
        self._under_way.append(plan)

    def settle(self, step: ScheduledStep, result: StepResult, now: float = 0.0) -> list[Sequence]:
        """Take the results of the oldest step in flight. Sequences that it ends give back their blocks.

        If the next step, already in flight, goes on with one of them, what it samples for that sequence is dropped.
        Blocks freed here are only given to steps still to be scheduled, and a device carries out steps in order: what
        that step stores for the dropped sequence is stored before a new owner writes.

        Args:
            now: for the trace, in seconds.

        Returns:
            The sequences that got a token, once for each token, in the step's order. All beams of a search get theirs
            at once.
        """
        if not self._under_way or self._under_way[0].index != step.index:
            raise RuntimeError(f"step {step.index} is not the one that has been under way longest")
        plan = self._under_way.popleft()
        self.manager.commit(plan.num_published)
        if plan.traced is not None:
            plan.traced.ended_s = now
        self.stats.prefix_hit_tokens += plan.num_hit_tokens
        self.stats.prefix_query_tokens += plan.num_looked_up_tokens
        self.stats.blocks_copied += len(plan.transfers.copies)
        self.stats.blocks_swapped_out += len(plan.transfers.swap_outs)
        self.stats.blocks_swapped_in += len(plan.transfers.swap_ins)
        if result.failed:
            self._fail_some(step, plan, result.failed)
        grown: list[Sequence] = []
        for one in plan.drawing:
            if one.is_finished or one in plan.void:  # ended by an abort, an error or a token; or restarted
                continue
            tokens = [*result.accepted.get(one.sequence_id, ()), result.token_ids[one.sequence_id]]
            num_new, ended = one.append_output_tokens(tokens)
            grown += [one] * num_new
            if one.sequence_id in plan.drafts:
                plan.accept(one, num_new - 1)
            if ended is not None:
                self.finish(one, *ended)
            elif one.num_placeholders:
                self._publish(one)
        ranking = (one for one in plan.ranking if not one.is_finished and one not in plan.void)
        asking = [(one, one.search) for one in ranking if one.search is not None]
        for beam, search in asking:
            search.offer(beam, result.candidates[beam.sequence_id])
        for search in dict.fromkeys(search for _, search in asking):
            if search.is_complete:
                grown += go_on(search, self)
        return grown

    def _publish(self, sequence: Sequence) -> None:
        """Make the block findable that the token just learnt completes, if the step behind computes it."""
        index, offset = divmod(sequence.num_known_tokens, self.manager.block_size)
        is_stored = (
            sequence.state is SequenceState.RUNNING and sequence.num_computed_tokens >= sequence.num_known_tokens
        )
        if offset == 0 and is_stored and self.enable_prefix_caching:
            chain = sequence.hash_chain(self.manager.block_size)
            self.manager.publish(sequence.sequence_id, chain, index - 1, index)

    def roll_back(self) -> None:
        """What is out has failed, and nobody knows how far it came: forget all that was built on it."""
        plan, self._turn = self._turn, None
        if self._under_way:
            lost = {*self.running, *self.swapped}
            for sequence in (one for out in self._under_way for one in out.drawing):
                sequence.drop_placeholders()
            self._under_way.clear()
        elif plan is not None:
            copies = {destination for _, destination in plan.transfers.copies}
            copied = [s for s, _ in plan.scheduled if not copies.isdisjoint(self.manager.table(s.sequence_id))]
            lost = {*plan.admitted, *copied, *plan.preempted}
            plan.drop_drafts()
        else:
            return
        self.manager.roll_back()
        self.manager.transfers = BlockTransfers()  # the plan itself may have failed
        for sequence in {one for loser in lost for one in loser.sequence_group}:
            self._begin_again(sequence)
        self.release_draining()

    def _begin_again(self, sequence: Sequence) -> None:
        """Free its blocks and queue it for recomputation."""
        if sequence.state in (SequenceState.RUNNING, SequenceState.SWAPPED):
            self._leave(sequence)
            self.restart(sequence)

    def restart(self, sequence: Sequence) -> None:
        """Queue one that holds nothing any more: it has to compute all that it knows again."""
        sequence.restart()
        insert_by_age(self.waiting, sequence)
        self.manager.events.append(("wait", sequence.sequence_id))

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

    def release_draining(self) -> None:
        """Where a batch leaves together and nobody of it runs any more: give back the blocks of its finished rows."""
        if not self.running:
            for sequence in self.draining:
                self.manager.free(sequence.sequence_id)
            self.draining.clear()

    # -- endings ----------------------------------------------------------------------------------------------------

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End the sequence in whatever state it is; its blocks are free at once, unless its batch leaves together.

        Ending twice changes nothing, except that an abort or an error frees such blocks, too.
        """
        is_cut_short = reason in ("abort", "error")
        if sequence.is_finished:
            if is_cut_short and sequence in self.draining:
                self.draining.remove(sequence)
                self.manager.free(sequence.sequence_id)
            return
        is_running = sequence.state is SequenceState.RUNNING
        if self.policy.drains_together and is_running and not is_cut_short:
            self.running.remove(sequence)
            self.draining.append(sequence)
        else:
            self._leave(sequence)
        sequence.finish(reason, stop_reason)
        self.manager.events.append(("end", sequence.sequence_id, reason))
        self.release_draining()

    def _fail_some(self, step: ScheduledStep, plan: StepPlan, failed: Mapping[int, str]) -> None:
        """End the requests of failed sequences. One whose NaN may come from elsewhere is recomputed instead.

        A block can be shared before its contents are checked: in the step that computes it, and in a step that is
        planned while that one is under way. So the NaN of a sequence with such a block may come from another request,
        even if that one has been aborted or preempted since: the tables of the step count. The NaN of a draft reaches
        the tokens before it.
        """
        computed = {s.sequence_id: s for s in step.sequences}
        computing = [(one, computed[one.sequence_id]) for one, _ in plan.scheduled]
        computing += [(child, computed[i]) for i, children in plan.forks.items() for child in children]
        for one, work in computing:
            if one.sequence_id not in failed:
                continue
            is_its_own = plan.suspect.isdisjoint(work.block_table) and not work.num_drafts
            plan.suspect.update(work.block_table)
            if one.is_finished:
                self.manager.forget(one.block_hashes[work.num_computed_tokens // self.manager.block_size :])
            elif one in plan.void:
                continue
            elif is_its_own:
                self.fail(one, failed[one.sequence_id])
            else:
                one.may_draft = one.may_draft and not work.num_drafts
                self._doubt(one, (plan, *self._under_way))
        for out in self._under_way:  # planned when all these blocks could be found
            out.suspect |= plan.suspect

    def _doubt(self, sequence: Sequence, turns: Iterable[StepPlan]) -> None:
        """Recompute a sequence whose stored keys may be another's NaN. What ``turns`` compute of it does not count."""
        for one in sequence.sequence_group:
            self.manager.forget(one.block_hashes)
            one.drop_placeholders()
            self._begin_again(one)
            for plan in turns:
                plan.void.add(one)

    def fail(self, sequence: Sequence, error: str, *, although_ended: bool = False) -> None:
        """End the request of a failed sequence: all of its unfinished samples or beams.

        Its keys and values may be NaN, also in blocks of earlier steps, so all its blocks leave the prefix cache.

        ``although_ended``: the finished ones get this error, too. The failed sequence itself always does.
        """
        for one in sequence.siblings or (sequence,):
            self.manager.forget(one.block_hashes)
            is_concerned = although_ended or one is sequence or not one.is_finished
            self.finish(one, "error")
            if is_concerned:
                one.finish_reason, one.stop_reason = "error", None
                one.error = f"request {one.request_id!r} failed after {one.num_output_tokens} tokens: {error}"

    def num_stored_tokens(self, step: ScheduledStep) -> int:
        """Tokens in the pool once ``step`` is computed, those of shared blocks counted once, and no drafts."""
        stored = {sequence.sequence_id: sequence.num_computed_tokens for sequence in self._holders()}
        stored.update((s.sequence_id, s.num_computed_tokens + s.num_known_tokens) for s in step.sequences)
        return self.manager.pool.num_used * self.manager.block_size - self.manager.num_empty_slots(stored)

    def check_integrity(self) -> None:
        """Raises RuntimeError unless law 2 holds, the crowd gate too, and exactly the running sequences hold blocks."""
        self.manager.check_integrity({s.sequence_id: s.num_computed_tokens for s in self._holders()})
        self.manager.swap.check_integrity({s.sequence_id for s in self.swapped})
        if len(self._holders()) > self.max_num_seqs:
            raise RuntimeError(f"{len(self._holders())} sequences run; max_num_seqs={self.max_num_seqs}")

    def _holders(self) -> list[Sequence]:
        return self.running + self.draining
