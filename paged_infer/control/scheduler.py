"""Schedule one step after another, record its launch (``advance``), and settle it with its results.

The policy decides which sequences run in a step, and with how many tokens, by the methods of a ``StepPlan``. When the
pool is exhausted the youngest running sequence gives back all its blocks, so the oldest always makes progress:
every request that fits in the pool finishes. The beams of one search give theirs back together.

The samples of one request hold a limited share of ``max_num_seqs`` (``sample_share``). Whenever some of them are
admitted, the rest move to the end of the waiting queue, so a request with many samples does not starve others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass

from paged_infer.control.beam_moves import step_beam_search
from paged_infer.control.beam_search import BeamSearch
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.blocks.snapshot import num_empty_slots
from paged_infer.control.policies import Chunked, Policy
from paged_infer.control.queues import Queues
from paged_infer.control.sequence import Sequence
from paged_infer.control.speculation import Proposer
from paged_infer.control.step import BlockTransfers, ScheduledStep, StepResult
from paged_infer.control.step_blocks import StepLimits
from paged_infer.control.step_entries import step_entry
from paged_infer.control.step_in_flight import StepInFlight
from paged_infer.control.step_log import StepLog, trace_step
from paged_infer.control.step_plan import StepPlan
from paged_infer.control.trace import Trace
from paged_infer.control.trace_step import TraceStep
from paged_infer.params import BeamSearchParams

PREEMPTION_MODES = ("recompute", "swap")


@dataclass(slots=True)
class SchedulerStats:
    steps: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0  # of the sequences admitted: tokens that could have been hits
    blocks_copied: int = 0
    blocks_swapped_out: int = 0
    blocks_swapped_in: int = 0
    num_drafts: int = 0  # sequences with drafts, summed over steps
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # drafts that became tokens

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were accepted; 0 while none was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    def record(self, flight: StepInFlight) -> None:
        """Count a step that has succeeded."""
        plan, transfers = flight.plan, flight.plan.transfers
        self.prefix_hit_tokens += plan.num_hit_tokens
        self.prefix_query_tokens += plan.num_looked_up_tokens
        self.blocks_copied += len(transfers.copies)
        self.blocks_swapped_out += len(transfers.swap_outs)
        self.blocks_swapped_in += len(transfers.swap_ins)
        for sequence_id, num_accepted in flight.num_accepted.items():
            self.num_drafts += 1
            self.num_draft_tokens += len(plan.drafts[sequence_id])
            self.num_accepted_tokens += num_accepted


class Scheduler:
    """Plans each step, and updates all sequences with its results.

    Args:
        manager: the block tables, which only the scheduler changes.
        max_num_seqs: the most sequences running at once (holding blocks), not just in one step.
        max_num_batched_tokens: the most tokens computed in one step.
        enable_prefix_caching: let requests with a common prefix share its blocks.
        preemption_mode: one of ``PREEMPTION_MODES``: a preempted sequence computes its blocks again, or has them moved
            to the manager's swap space and back. If that is full, it computes them again.
        policy: chooses what each step computes; ``Chunked()`` if None.
        proposer: drafts for sequences that decode. A step with drafts must be settled before the next is planned.
        trace: keeps a record of every step.

    ``policy``, ``proposer`` and the limits are attributes, read for each step.
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
            raise ValueError(f"preemption_mode={preemption_mode!r}: must be one of {', '.join(PREEMPTION_MODES)}")
        self.manager = manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.policy = policy or Chunked()
        self.proposer = proposer
        self.trace = trace
        if trace is not None:
            trace.block_size = manager.block_size
        self.swaps = preemption_mode == "swap"
        self.queues = Queues(manager)
        self.waiting, self.running, self.swapped = self.queues.waiting, self.queues.running, self.queues.swapped
        self.searches: dict[str, BeamSearch] = {}  # by request id
        self.stats = SchedulerStats()
        self.step_log: StepLog | None = None  # set by a client that wants every step
        self._planned: StepPlan | None = None  # scheduled, and not launched yet
        self._recorded: TraceStep | None = None  # of the last step scheduled
        self._in_flight: deque[StepInFlight] = deque()  # launched, and not settled yet

    @property
    def has_work(self) -> bool:
        """Whether a step can be planned: not for sequences that only wait for their last token to be read."""
        return bool(self.waiting or self.swapped) or any(not one.is_length_capped for one in self.running)

    @property
    def has_step_in_flight(self) -> bool:
        """Whether a step is in flight."""
        return bool(self._in_flight)

    def add(self, sequences: ReadOnlyList[Sequence], beam_params: BeamSearchParams | None = None) -> None:
        """Queue the sequences of a new request. ``beam_params``: they are the beams of this search."""
        self.queues.add(sequences)
        if beam_params is not None:
            self.searches[sequences[0].request_id] = BeamSearch(beam_params, sequences)

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """See ``Queues.finish``."""
        self.queues.finish(sequence, reason, stop_reason)
        self._drop_search(sequence)

    def fail(self, sequence: Sequence, error: str, *, include_finished: bool = False) -> None:
        """See ``Queues.fail``."""
        self.queues.fail(sequence, error, include_finished=include_finished)
        self._drop_search(sequence)

    def _drop_search(self, sequence: Sequence) -> None:
        search = self.searches.get(sequence.request_id)
        if search is not None and sequence in search.beams and all(one.is_finished for one in search.beams):
            del self.searches[sequence.request_id]

    # -- one step ---------------------------------------------------------------------------------------------------

    def schedule(self, now: float = 0.0) -> ScheduledStep:
        """Choose the next step's work and give it blocks. ``advance`` must follow; a step without it has failed.

        A step can be planned while the one before is still being computed: call ``advance`` for that one first, and
        ``settle`` when its tokens are known. Until then its sequences continue with placeholders.

        ``now``: the caller's clock, seconds.
        """
        if self._planned is not None:
            self.roll_back()
        self.stats.steps += 1
        limits = StepLimits(
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.enable_prefix_caching,
            self.swaps,
            self.policy.chunks_prompts,
        )
        self.queues.drains_together = self.policy.drains_together
        plan = self._planned = StepPlan(self.queues, limits, self.stats.steps, now, self.policy.victim)
        self.policy.plan(plan)
        if not plan.scheduled and plan.resume_at_s is None and not self._in_flight:
            Chunked().plan(plan)  # otherwise sequences that a policy forgets, such as swapped ones, would wait forever
        if self.proposer is not None:
            plan.speculate(self.proposer)
        self.stats.preemptions += len(plan.preempted)
        self.manager.transfers = BlockTransfers()
        self._recorded = self._record(plan)
        self.manager.events = []
        forks, drafts = plan.forks, plan.drafts
        table_of, entries = self.manager.table, []
        for s, n in plan.scheduled:
            i = s.sequence_id
            entries.append(step_entry(s, n, table_of(i), forks.get(i, ()), drafts.get(i, ())))
        return ScheduledStep(plan.index, entries, plan.transfers, plan.resume_at_s)

    def _record(self, plan: StepPlan) -> TraceStep | None:
        """Add the step to the trace and to the log of steps, where there is one."""
        if self.trace is None and self.step_log is None:
            return None
        step = trace_step(plan, self.queues)
        if self.trace is not None:
            self.trace.steps.append(step)
        if self.step_log is not None and not self.step_log.append(step):
            self.step_log = None
        return step

    def advance(self, step: ScheduledStep) -> None:
        """The step has been launched: its tokens count as computed, and those that it samples are placeholders."""
        plan, self._planned = self._planned, None
        if plan is None or plan.index != step.index:
            raise RuntimeError(f"step {step.index} is not the last one scheduled")
        num_published = self.manager.num_uncommitted - sum(flight.num_published for flight in self._in_flight)
        self._in_flight.append(StepInFlight(plan, self.queues, num_published, self._recorded))

    def settle(self, step: ScheduledStep, result: StepResult, now: float = 0.0) -> list[Sequence]:
        """Apply the results of the oldest step in flight, at ``now``. Sequences that end give back their blocks.

        If the next step, already in flight, continues one of them, what it samples for that sequence is dropped.
        Blocks freed here are only given to steps still to be scheduled, and a device runs steps in order: what the
        step in flight writes there comes before the writes of the new owner.

        Returns:
            The sequences that got a token, once for each token, in the step's order; all beams of a search get theirs
            together.
        """
        if not self._in_flight or self._in_flight[0].plan.index != step.index:
            raise RuntimeError(f"step {step.index} is not the oldest one in flight")
        flight = self._in_flight.popleft()
        self.manager.commit(flight.num_published)
        if flight.trace_step is not None:
            flight.trace_step.ended_s = now
            flight.trace_step.expert_load = result.expert_load
        if result.failed:
            flight.fail(step, result.failed, self._in_flight)
        grown = flight.append_tokens(result)
        self.stats.record(flight)
        if flight.beams or self.searches:
            grown += self._step_searches(flight, result)
        return grown

    def _step_searches(self, flight: StepInFlight, result: StepResult) -> list[Sequence]:
        """Pass the candidates to their searches, and step those that have them all. Returns the beams that grew."""
        grown: list[Sequence] = []
        touched: dict[str, BeamSearch] = {}  # by request id
        for beam in flight.beams:
            if not beam.is_finished and beam not in flight.restarted:
                search = touched[beam.request_id] = self.searches[beam.request_id]
                search.add_candidates(beam, result.candidates[beam.sequence_id])
        for search in touched.values():
            if search.is_complete:
                grown += step_beam_search(search, self.queues)
        for sequence, _ in flight.plan.scheduled:
            self._drop_search(sequence)
        return grown

    def roll_back(self) -> None:
        """All steps planned or in flight have failed, with unknown progress: restart what was built on them."""
        plan, self._planned = self._planned, None
        if self._in_flight:
            affected = [*self.running, *self.swapped]
            for sequence in (one for flight in self._in_flight for one in flight.sampling):
                sequence.drop_placeholders()
            self._in_flight.clear()
        elif plan is not None:
            affected = plan.undo()
        else:
            return
        self.manager.roll_back()
        self.manager.transfers = BlockTransfers()  # planning itself may have failed
        group = (one for sequence in affected for one in sequence.sequence_group)
        for sequence in dict.fromkeys(group):  # not a set: every rank must free blocks in the same order
            self.queues.restart(sequence)
        self.queues.release_draining()

    # -- looking inside ---------------------------------------------------------------------------------------------

    def num_stored_tokens(self, step: ScheduledStep) -> int:
        """Tokens in the pool once ``step`` is computed, those of shared blocks counted once, and no drafts."""
        stored = {sequence.sequence_id: sequence.num_computed_tokens for sequence in self.queues.holders}
        stored.update((s.sequence_id, s.num_computed_tokens + s.num_known_tokens) for s in step.sequences)
        tables = ((sequence_id, self.manager.table(sequence_id), n) for sequence_id, n in stored.items())
        block_size = self.manager.block_size
        return self.manager.pool.num_used * block_size - num_empty_slots(tables, block_size)

    def check_integrity(self) -> None:
        """Raises RuntimeError unless law 2 holds, and at most ``max_num_seqs`` sequences hold blocks."""
        self.queues.check_integrity()
        if (num_seqs := len(self.queues.holders)) > self.max_num_seqs:
            raise RuntimeError(f"{num_seqs} sequences are running: max_num_seqs={self.max_num_seqs}")
