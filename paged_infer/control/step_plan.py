"""One step while it is being planned. A policy fills it by three methods, in any order:

    schedule_running()   running sequences continue; if blocks are short, they preempt the youngest not scheduled yet
    resume_swapped()     swapped sequences return           }  never at the cost of a running one,
    admit_waiting()      waiting sequences are admitted     }  and not in a step that had to preempt

or, one sequence at a time, by ``schedule(sequence)``, ``admit(sequence)`` and ``preempt(sequence)``.

Then ``speculate()`` adds drafts to sequences that decode, from the budget and blocks that are left.

Samples of one request are admitted together, as many as there is room for, and only the first computes the prompt:

    step    1                2                 3
    S0      p0 .. p6         p7 p8 -> a        a -> b        both sample from the logits of p8, each with its own noise,
    S1      (waits)          fork  -> c        c -> d        and p8's block is copied before the first of them writes
    S2      (waits)          (no room: it moves to the end of the queue; later p0 .. p7 are prefix cache hits)

Beams are admitted all together, with places reserved for them, and again after each preemption: the first computes the
tokens that all have in common, and the others fork from there. From then on they are a sequence group and are preempted
together. A beam with no token left to compute is idle until the others have caught up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paged_infer.control.blocks.manager import Allocation
from paged_infer.control.guided.grammar import GrammarError, Matcher, num_allowed
from paged_infer.control.sequence import PLACEHOLDER, Sequence
from paged_infer.control.sequence_state import SequenceState
from paged_infer.control.speculation import Proposer
from paged_infer.control.step_blocks import StepBlocks


class StepPlan(StepBlocks):
    """The sequences of a step, with how many tokens each computes.

    Attributes:
        now: the caller's clock, seconds.
        resume_at_s: when to plan again; set by a policy that intentionally leaves the step empty.
        max_num_seqs: the most sequences running at once; a policy may lower it.
        budget: tokens that the step may still compute.
        scheduled: sequences and their numbers of tokens.
        running, waiting, swapped: the queues, by arrival; a policy may reorder ``waiting`` and ``swapped``.
    """

    # -- for policies -----------------------------------------------------------------------------------------------

    def schedule_running(self, key: Callable[[Sequence], Any] | None = None) -> None:
        """Give every running sequence its tokens, the oldest first; a long prompt leaves one for each that follows.

        If the budget has fewer tokens than sequences run, those scheduled longest ago go first.

        Args:
            key: the order instead, as for ``sorted``, whatever the budget.
        """
        order = [sequence for sequence in self.running if self._has_next(sequence)]
        if key is not None:
            order.sort(key=key)
        elif len(order) > self.budget:
            order.sort(key=lambda sequence: sequence.last_step)
        for num_following, sequence in zip(range(len(order) - 1, -1, -1), order, strict=True):
            if not self.budget:
                break
            self._continue(sequence, max(1, self.budget - num_following))

    def resume_swapped(self) -> None:
        """Bring back the oldest swapped sequences while there is budget, a place, and room for all known tokens."""
        while self.swapped and self.budget and not self._closed:
            group = list(self.swapped[0].sequence_group)
            if not self._has_place(group) or not self._fits(group[0].num_uncomputed_tokens):
                break
            if not self._manager.swap_in(*map(self._swap_in_of, group)):
                break
            for sequence in group:
                sequence.has_hits |= bool(self._chain(sequence))  # its blocks may have been found, not moved
                self._start(sequence)
            for sequence in group:  # those beyond the budget continue in the next step, like all running ones
                if self.budget and sequence.num_uncomputed_tokens:
                    self._schedule_first(sequence)

    def admit_waiting(self) -> None:
        """Admit the head of the queue while there is budget, a place, and room for all its known tokens.

        Nothing is admitted while any sequence is swapped out. A request with its full share of the places (see
        ``sample_share``) is skipped.
        """
        while self.budget and not self._closed and not self.swapped:
            sequence = self._head()
            if sequence is None or not self._admit(sequence):
                break

    def schedule(self, sequence: Sequence, most: int | None = None) -> bool:
        """Give one running sequence its next tokens, at most ``most``; others are preempted if blocks are short.

        False, and nothing is scheduled: it does not run, has no token to compute, or is in the step already; or the
        budget is spent, or it was preempted itself.
        """
        if most is not None and most < 1:
            raise ValueError(f"most={most}: must be at least 1")
        is_able = self.budget > 0 and sequence.state is SequenceState.RUNNING and self._has_next(sequence)
        return is_able and self._continue(sequence, min(self.budget, most or self.budget))

    def admit(self, sequence: Sequence) -> bool:
        """Admit one waiting sequence, whatever its place in the queue, also while others are swapped out.

        Of several samples or beams that wait to compute their prompt once, the first is admitted. False, and nothing
        is admitted: it does not wait, or budget, places (see ``sample_share``) or blocks do not suffice.
        """
        if self.budget < 1 or sequence.state is not SequenceState.WAITING:
            return False
        leader = sequence.leader
        has_share = self._queues.num_left_of_share(leader, self.max_num_seqs) > 0
        return has_share and leader.state is SequenceState.WAITING and self._admit(leader)

    def preempt(self, sequence: Sequence) -> bool:
        """Take all blocks of a running sequence, and of the other beams of its search: they are swapped out, or wait.

        ``admit`` may give them to another in the same step; ``resume_swapped`` and ``admit_waiting`` do nothing in it
        any more. False, and nothing is preempted: it does not run, or is in the step already.
        """
        group = list(sequence.sequence_group)
        if sequence.state is not SequenceState.RUNNING or any(one.last_step == self.index for one in group):
            return False
        self._preempt(group)
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Admit a sequence that waits and is its own leader, if there are a place, blocks and budget."""
        if not self._has_place([sequence]):
            return False
        prefix = self._find_prefix(sequence)
        if self._manager.can_allocate(self._num_tokens_with_forks(sequence), prefix) is not Allocation.OK:
            return False
        if not self._fits(sequence.num_tokens - len(prefix) * self._manager.block_size):
            return False
        self._start(sequence)
        self._adopt(sequence, prefix)
        self._schedule_first(sequence)
        return True

    def _continue(self, sequence: Sequence, most: int) -> bool:
        """Schedule up to ``most`` tokens of a sequence, if it still runs and is not in the step yet."""
        if sequence.state is not SequenceState.RUNNING or sequence.last_step == self.index:
            return False
        num_tokens = self._num_next(sequence, most)
        has_room = self._make_room(sequence, num_tokens)
        if has_room:
            self._schedule(sequence, num_tokens)
        return has_room

    # -- for the scheduler ------------------------------------------------------------------------------------------

    def speculate(self, proposer: Proposer) -> None:
        """Add drafts, once all else has been scheduled, to sequences that compute their last known token.

        No sequence is preempted, kept waiting or cut short for a draft, and none drafts beyond its last token. One with
        a grammar drafts the tokens that must come (jump-forward), or else the proposed ones that it allows.
        """
        for place, (sequence, num_tokens) in enumerate(self.scheduled):
            end, sequence_id = sequence.num_tokens, sequence.sequence_id
            most = min(self.budget, sequence.max_total_tokens - 1 - end)
            is_ready = sequence.num_uncomputed_tokens == 1 and not sequence.num_placeholders and not sequence.is_retried
            if most < 1 or not is_ready or sequence.is_beam or sequence_id in self.forks:
                continue
            drafts = proposer.propose(sequence.token_ids, most)
            if sequence.matcher is not None and PLACEHOLDER not in drafts:
                drafts = _allowed(sequence.matcher, drafts, most)
            while drafts and not self._manager.reserve(sequence_id, end, end + len(drafts)):
                drafts.pop()
            if drafts:
                self.drafts[sequence_id] = drafts
                self.budget -= len(drafts)
                self.scheduled[place] = (sequence, num_tokens + len(drafts))

    def undo(self) -> list[Sequence]:
        """The step was not launched, or failed: give back blocks for drafts. Returns the sequences to restart."""
        copies = {destination for _, destination in self.transfers.copies}
        copied = [s for s, _ in self.scheduled if not copies.isdisjoint(self._manager.table(s.sequence_id))]
        for sequence, _ in self.scheduled:
            if sequence.sequence_id in self.drafts and sequence.state is SequenceState.RUNNING:
                self._manager.trim(sequence.sequence_id, sequence.num_computed_tokens)
        return [*self.admitted, *copied, *self.preempted]


def _allowed(matcher: Matcher, drafts: list[int], most: int) -> list[int]:
    """The tokens that must come, or else those of ``drafts`` that may. None if it fails: its mask will say so."""
    try:
        return matcher.forced()[:most] or drafts[: num_allowed(matcher, drafts)]
    except GrammarError:
        return []
