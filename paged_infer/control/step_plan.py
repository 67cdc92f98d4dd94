"""One step while it is being planned. A policy fills it by three methods, in any order:

    schedule_running()   running sequences continue; if blocks are short, they preempt the youngest not scheduled yet
    resume_swapped()     swapped sequences return           }  never at the cost of a running one,
    admit_waiting()      waiting sequences are admitted     }  and not in a step that had to preempt

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

from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass

from paged_infer.control.blocks.manager import Allocation, SwapIn, Table
from paged_infer.control.guided.grammar import num_allowed
from paged_infer.control.queues import Queues
from paged_infer.control.sequence import PLACEHOLDER, Sequence
from paged_infer.control.sequence_state import SequenceState
from paged_infer.control.speculation import Proposer


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a step may do. ``swaps``: preempted sequences go to swap space. ``chunks_prompts``: see ``Policy``."""

    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool
    swaps: bool
    chunks_prompts: bool


class StepPlan:
    """The sequences of a step, with how many tokens each computes.

    Attributes:
        now: the caller's clock, seconds.
        resume_at_s: when to plan again; set by a policy that intentionally leaves the step empty.
        max_num_seqs: the most sequences running at once; a policy may lower it.
        budget: tokens that the step may still compute.
        scheduled: sequences and their numbers of tokens.
        running, waiting, swapped: the queues, by arrival; a policy may reorder ``waiting``.
    """

    def __init__(self, queues: Queues, limits: StepLimits, index: int, now: float) -> None:
        self.index = index
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

    # -- for policies -----------------------------------------------------------------------------------------------

    def schedule_running(self) -> None:
        """Give every running sequence its tokens, the oldest first; a long prompt leaves one for each that follows.

        If the budget has fewer tokens than sequences run, those scheduled longest ago go first.
        """
        # Without beams that are idle, and sequences that only wait for their last token to be read.
        order = [
            s
            for s in self.running
            if s.num_computed_tokens != len(s.token_ids) and not (s.num_placeholders and s.is_length_capped)
        ]
        if len(order) > self.budget:
            order.sort(key=lambda sequence: sequence.last_step)
        for num_following, sequence in zip(range(len(order) - 1, -1, -1), order, strict=True):
            if not self.budget:
                break
            if sequence.state is not SequenceState.RUNNING or sequence.last_step == self.index:
                continue
            num_tokens = self._num_next(sequence, max(1, self.budget - num_following))
            if self._make_room(sequence, num_tokens):
                self._schedule(sequence, num_tokens)

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
            if sequence is None or not self._has_place([sequence]):
                break
            prefix = self._find_prefix(sequence)
            if self._manager.can_allocate(self._num_tokens_with_forks(sequence), prefix) is not Allocation.OK:
                break
            if not self._fits(sequence.num_tokens - len(prefix) * self._manager.block_size):
                break
            self._start(sequence)
            self._adopt(sequence, prefix)
            self._schedule_first(sequence)

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
                drafts = sequence.matcher.forced()[:most] or drafts[: num_allowed(sequence.matcher, drafts)]
            while drafts and not self._manager.reserve(sequence_id, end, end + len(drafts)):
                drafts.pop()
            if drafts:
                self.drafts[sequence_id] = drafts
                self.budget -= len(drafts)
                self.scheduled[place] = (sequence, num_tokens + len(drafts))

    def publish(self, sequence: Sequence, start: int, end: int) -> None:
        """Publish the blocks that are full once tokens ``start`` to ``end`` are stored, as far as they are known."""
        first, last = start // self._manager.block_size, end // self._manager.block_size
        if first < last and self._limits.enable_prefix_caching:
            chain = sequence.hash_chain(self._manager.block_size)
            self._manager.publish(sequence.sequence_id, chain, first, min(last, len(chain)))

    def undo(self) -> list[Sequence]:
        """The step was not launched, or failed: give back blocks for drafts. Returns the sequences to restart."""
        copies = {destination for _, destination in self.transfers.copies}
        copied = [s for s, _ in self.scheduled if not copies.isdisjoint(self._manager.table(s.sequence_id))]
        for sequence, _ in self.scheduled:
            if sequence.sequence_id in self.drafts and sequence.state is SequenceState.RUNNING:
                self._manager.trim(sequence.sequence_id, sequence.num_computed_tokens)
        return [*self.admitted, *copied, *self.preempted]

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
        """Reserve blocks for ``num_tokens`` more, preempting the youngest if necessary; False if that does not help."""
        start = sequence.num_computed_tokens
        while not self._manager.reserve(sequence.sequence_id, start, start + num_tokens):
            victims = list(self.running[-1].sequence_group)
            if any(victim.last_step == self.index for victim in victims):
                return False  # they are scheduled already; in the next step this sequence goes first
            self.preempted += victims
            self._queues.preempt(victims, swaps=self._limits.swaps)
            self._closed = bool(self.running)
            if sequence in victims:
                return False
        return True

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
