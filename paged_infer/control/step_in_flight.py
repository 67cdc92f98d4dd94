"""A step that has been launched: what it adds to its sequences, and how its results are applied.

While it is in flight, sequences may end or restart, and others may share the blocks that it fills. Only its results
show whether a sequence failed (its logits are NaN), which may be the fault of another: ``fail`` computes it again then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from paged_infer.control.guided.grammar import GrammarError
from paged_infer.control.queues import Queues
from paged_infer.control.sequence import Sequence
from paged_infer.control.sequence_state import SequenceState
from paged_infer.control.step import ScheduledStep, StepResult
from paged_infer.control.step_plan import StepPlan
from paged_infer.control.trace_step import TraceStep


class StepInFlight:
    """From launch to results. Its tokens count as computed, and those that it samples are placeholders.

    Attributes:
        sampling: sequences that get a token.
        beams: sequences that get candidates.
        restarted: sequences restarted since: their results in this step are dropped.
        num_accepted: drafts accepted, by the id of each sequence that had some in the step.
        num_published: hashes that are committed once the step has succeeded.
    """

    def __init__(self, plan: StepPlan, queues: Queues, num_published: int, trace_step: TraceStep | None) -> None:
        self.plan = plan
        self.num_published = num_published
        self.trace_step = trace_step
        self.sampling: list[Sequence] = []
        self.beams: list[Sequence] = []
        self.restarted: set[Sequence] = set()
        self.num_accepted: dict[int, int] = {}
        self._queues = queues
        for sequence, num_tokens in plan.scheduled:
            if sequence.state is not SequenceState.FINISHED:  # by an abort, after the step was planned
                sequence.num_computed_tokens += num_tokens - len(plan.drafts.get(sequence.sequence_id, ()))
                if sequence.num_computed_tokens == len(sequence.token_ids):
                    if sequence.is_beam:
                        self.beams.append(sequence)
                    else:
                        sequence.append_placeholder()
                        self.sampling.append(sequence)
            if sequence.sequence_id in plan.forks:
                sequence.num_common_tokens = 0
            for child in plan.forks.get(sequence.sequence_id, ()):
                child.num_common_tokens = 0
                if not child.is_beam and not child.is_finished:
                    child.append_placeholder()
                    self.sampling.append(child)

    def append_tokens(self, result: StepResult) -> list[Sequence]:
        """Append what the step sampled, and end sequences. Returns the sequences, once for each token they got."""
        grown: list[Sequence] = []
        for one in self.sampling:
            if one.is_finished or one in self.restarted:
                continue
            tokens = [*result.accepted.get(one.sequence_id, ()), result.token_ids[one.sequence_id]]
            num_before = one.num_output_tokens
            try:
                num_new, ended = one.append_output_tokens(tokens)
            except GrammarError as error:
                result.failed[one.sequence_id] = str(error)
                self._queues.fail(one, str(error))
                grown += [one] * (one.num_output_tokens - num_before)  # drafts that came before
                continue
            grown += [one] * num_new
            if one.sequence_id in self.plan.drafts:
                self._accept(one, num_new - 1)
            if ended is not None:
                self._queues.finish(one, *ended)
            elif one.num_placeholders:
                self._publish_resolved(one)
        return grown

    def _publish_resolved(self, sequence: Sequence) -> None:
        """Publish the block that the newest known token completes, if the next step computes that token."""
        num_known = sequence.num_known_tokens
        if sequence.state is SequenceState.RUNNING and sequence.num_computed_tokens >= num_known:
            self.plan.publish(sequence, num_known - 1, num_known)

    def _accept(self, sequence: Sequence, num_accepted: int) -> None:
        """Count the sequence's accepted drafts as computed, and free the blocks of the others."""
        start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + num_accepted
        sequence.num_computed_tokens = end
        self.plan.publish(sequence, start, end)
        self._queues.manager.commit()  # the blocks are stored: their step is over, and no other is in flight
        self._queues.manager.trim(sequence.sequence_id, end)
        self.num_accepted[sequence.sequence_id] = num_accepted
        if self.trace_step is not None:
            num_drafts = len(self.plan.drafts[sequence.sequence_id])
            self.trace_step.rejected[sequence.sequence_id] = num_drafts - num_accepted

    def fail(self, step: ScheduledStep, failed: Mapping[int, str], later: Iterable[StepInFlight]) -> None:
        """End the requests of failed sequences. If the NaN may come from elsewhere, the sequence is recomputed, once.

        A block can be shared before its contents are checked: in the step that computes it, and in a step that is
        planned while that one is in flight. So the NaN of a sequence with prefix hits may come from another request,
        even one aborted or preempted since. The NaN of a draft also reaches the tokens before it. Computed again
        without hits and drafts, a sequence can only fail by itself.
        """
        computed = {s.sequence_id: s for s in step.sequences}
        computing = [(one, computed[one.sequence_id]) for one, _ in self.plan.scheduled]
        computing += [(child, computed[i]) for i, children in self.plan.forks.items() for child in children]
        for one, work in computing:
            if one.sequence_id not in failed:
                continue
            if one.is_finished:
                block_size = self._queues.manager.block_size
                self._queues.manager.forget(one.block_hashes[work.num_computed_tokens // block_size :])
            elif one in self.restarted:
                continue
            elif one.is_retried or not (one.has_hits or work.num_drafts):
                self._queues.fail(one, failed[one.sequence_id])
            else:
                self._recompute(one, (self, *later))

    def _recompute(self, sequence: Sequence, flights: Iterable[StepInFlight]) -> None:
        """Restart a sequence that may have read another's NaN. Its results in ``flights`` do not count."""
        for one in sequence.sequence_group:
            one.is_retried = True
            self._queues.manager.forget(one.block_hashes)
            one.drop_placeholders()
            self._queues.restart(one)
            for flight in flights:
                flight.restarted.add(one)
