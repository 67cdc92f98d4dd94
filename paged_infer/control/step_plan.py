"""One step while it is being filled: the verbs that a schedule is made of.

    run()      who runs goes on: takes blocks, if need be those of the youngest who has not had its plan yet
    resume()   who is swapped comes back     }  never at the cost of anybody who runs,
    admit()    who waits comes in            }  and not in a step that had to preempt
    speculate()  who decodes also computes drafts, from what budget and blocks nobody else has asked for

Samples of one request are admitted together, as many as there is room for, and only the first computes the prompt:

    step    1                2                 3
    S0      p0 .. p6         p7 p8 -> a        a -> b        both draw from the logits of p8, each by its own noise,
    S1      (waits)          fork  -> c        c -> d        and p8's block is copied before the first of them writes
    S2      (waits)          (no room: it moves to the end of the queue; later p0 .. p7 are prefix cache hits)

Beams are admitted all together, with places reserved for them, and again after each preemption: the first computes the
tokens that all have in common, and the others fork from there.
From then on they are a sequence group and are preempted together. A beam with no token left to compute waits, idle.

Until the step has succeeded, nothing that was built on it is certain. ``fresh`` lists who would have to begin again.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence as ReadOnlyList
from typing import TYPE_CHECKING

from paged_infer.control.blocks.manager import Allocation, Returning, Table
from paged_infer.control.request import Sequence, SequenceState

if TYPE_CHECKING:
    from paged_infer.control.scheduler import Scheduler
    from paged_infer.control.trace import TraceStep


class StepPlan:
    """The step of one index: what is left of its budget, and who computes how many tokens."""

    def __init__(self, scheduler: Scheduler, index: int, now: float) -> None:
        self.index = index
        self.now = now
        self.resume_at_s: float | None = None  # a policy that lets the step be empty says until when
        self.max_num_seqs = scheduler.max_num_seqs
        self.budget = scheduler.max_num_batched_tokens  # tokens
        self.scheduled: list[tuple[Sequence, int]] = []
        self.forks: dict[int, list[Sequence]] = {}  # by the id of the sequence that computes their beginning
        self.drafts: dict[int, list[int]] = {}  # by sequence id; see control.speculation
        self.preempted: list[Sequence] = []
        self.transfers = scheduler.manager.transfers  # what the verbs ask for, whether or not the plan comes to its end
        self.admitted: list[Sequence] = []
        self._closed = False  # to newcomers, because somebody was preempted for others
        self.drawing: list[Sequence] = []  # who gets a token from it
        self.ranking: list[Sequence] = []  # beams that get candidates
        self.void: set[Sequence] = set()  # restarted since: their results in this step are dropped
        self.suspect: set[int] = set()  # blocks that may hold the NaN of a failed sequence
        self.num_published = 0  # blocks that are there once it has succeeded
        self.traced: TraceStep | None = None
        self.num_hit_tokens = 0
        self.num_looked_up_tokens = 0
        self._scheduler = scheduler
        self._manager = scheduler.manager
        self.running = scheduler.running
        self.waiting = scheduler.waiting
        self.swapped = scheduler.swapped

    def schedule_running(self) -> None:
        """Give every running sequence its tokens, the oldest first; a long prompt leaves one for each who follows.

        Where the budget has fewer tokens than sequences run, they take turns: those served longest ago first.
        """
        # Not beams that wait, idle, nor those that only wait for their last token to be read.
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
        """Bring the oldest of the swapped back while there is budget, a place, and room for all its known tokens."""
        while self.swapped and self.budget and not self._closed:
            group = list(self.swapped[0].sequence_group)
            if not self._has_place(group) or not self._fits(group[0].num_uncomputed_tokens):
                break
            if not self._manager.swap_in(*map(self._returning, group)):
                break
            for sequence in group:
                self.swapped.remove(sequence)
                self._enter(sequence)
            for sequence in group:  # those beyond the budget go on in the next step, like all that run
                if self.budget and sequence.num_uncomputed_tokens:
                    self._start(sequence)

    def admit_waiting(self) -> None:
        """Let the head of the queue in while there is budget, a place, and room for all its known tokens.

        Nothing is admitted while any sequence is swapped out. A request whose samples hold their full share of the
        places is skipped.
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
            self.waiting.remove(sequence)
            self._enter(sequence)
            self._adopt(sequence, prefix)
            self._start(sequence)

    def speculate(self) -> None:
        """Draft for those whose last known token is computed in this step, once everybody else has been served.

        Nobody is preempted, kept out or cut short for a draft. A sequence drafts no further than it could get.
        """
        proposer = self._scheduler.proposer
        if proposer is None:
            return
        for place, (sequence, num_tokens) in enumerate(self.scheduled):
            end, sequence_id = sequence.num_tokens, sequence.sequence_id
            most = min(self.budget, sequence.max_total_tokens - 1 - end)
            is_ready = sequence.num_uncomputed_tokens == 1 and not sequence.num_placeholders and sequence.may_draft
            if most < 1 or not is_ready or sequence.search is not None or sequence_id in self.forks:
                continue
            drafts = proposer.propose(sequence.token_ids, most)
            while drafts and not self._manager.reserve(sequence_id, end, end + len(drafts)):
                drafts.pop()
            if drafts:
                self.drafts[sequence_id] = drafts
                self.budget -= len(drafts)
                self.scheduled[place] = (sequence, num_tokens + len(drafts))

    def accept(self, sequence: Sequence, num_accepted: int) -> None:
        """So many of the sequence's drafts have become its tokens, computed like any; the others leave no trace."""
        num_drafts, block_size = len(self.drafts[sequence.sequence_id]), self._manager.block_size
        self._scheduler.stats.num_drafts += 1
        self._scheduler.stats.num_draft_tokens += num_drafts
        self._scheduler.stats.num_accepted_tokens += num_accepted
        start, end = sequence.num_computed_tokens, sequence.num_computed_tokens + num_accepted
        sequence.num_computed_tokens = end
        if start // block_size < end // block_size and self._scheduler.enable_prefix_caching:
            chain = sequence.hash_chain(block_size)
            self._manager.publish(sequence.sequence_id, chain, start // block_size, end // block_size)
            self._manager.commit()  # they are there: their step is over, and no other is out
        self._manager.trim(sequence.sequence_id, end)
        if self.traced is not None:
            self.traced.rejected[sequence.sequence_id] = num_drafts - num_accepted

    def drop_drafts(self) -> None:
        """The step has failed: what was reserved for drafts is given back."""
        for sequence, _ in self.scheduled:
            if sequence.sequence_id in self.drafts and sequence.state is SequenceState.RUNNING:
                self._manager.trim(sequence.sequence_id, sequence.num_computed_tokens)

    def _num_next(self, sequence: Sequence, most: int) -> int:
        """How many tokens it computes next: up to where others fork from it, if that is still to come."""
        end = len(sequence.token_ids)
        if sequence.num_common_tokens > sequence.num_computed_tokens and sequence.to_fork:
            end = sequence.num_common_tokens
        return min(end - sequence.num_computed_tokens, most)

    def _num_tokens_with_forks(self, sequence: Sequence) -> int:
        """Tokens that fill as many blocks as the sequence and, without the common ones, its forks.

        Only beams count as forks here: samples are forked later, if there is room.
        """
        forks, block_size = sequence.to_fork, self._manager.block_size
        if not forks or sequence.search is None:
            return sequence.num_tokens
        num_common = sequence.num_common_tokens // block_size
        own = sum(self._manager.blocks_for(fork.num_tokens) - num_common for fork in forks)
        return (self._manager.blocks_for(sequence.num_tokens) + own) * block_size

    def _returning(self, sequence: Sequence) -> Returning:
        num_stored = sequence.num_computed_tokens
        chain = self._chain(sequence)[: num_stored // self._manager.block_size]
        return Returning(sequence.sequence_id, chain, num_stored, sequence.num_tokens)

    def _head(self) -> Sequence | None:
        """The first sequence of the queue that may be admitted, or None.

        Skips sequences that will be forked from a running sibling, and samples of a request that holds its full share.
        """
        passed: set[str] = set()
        for sequence in self.waiting:
            if sequence.request_id in passed:
                continue
            leader = sequence.leader  # a policy may have put another sample first
            if leader.state is SequenceState.WAITING and self._num_left_of_share(leader) > 0:
                return leader
            passed.add(sequence.request_id)
        return None

    def _has_place(self, group: ReadOnlyList[Sequence]) -> bool:
        """Whether there are places for the group and for the beams that will be forked from it."""
        wanted = len(group) + (len(group[0].to_fork) if group[0].search is not None else 0)
        return wanted <= self._num_places() or not (self.running or self._scheduler.draining)

    def _num_places(self) -> int:
        """Places that are neither taken nor reserved for beams that will be forked."""
        promised = sum(len(one.to_fork) for one in self.running if one.search is not None)
        return self.max_num_seqs - len(self.running) - len(self._scheduler.draining) - promised

    def _num_left_of_share(self, sequence: Sequence) -> int:
        """How many more samples of the sequence's request may be admitted by its share of the places."""
        if sequence.search is not None or len(sequence.siblings) < 2:
            return self.max_num_seqs
        held = sum(one.request_id == sequence.request_id for one in self._scheduler.draining)
        running = sum(one.state is SequenceState.RUNNING for one in sequence.siblings)
        return sample_share(self.max_num_seqs) - running - held

    def _fits(self, num_tokens: int) -> bool:
        """Whether the budget has room for these tokens of a newcomer, or for some of them where that will do."""
        return self._scheduler.policy.chunks_prompts or num_tokens <= self.budget

    def _chain(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the sequence's full blocks; none where nothing is cached."""
        if not self._scheduler.enable_prefix_caching:
            return []
        return sequence.hash_chain(self._manager.block_size)

    def _find_prefix(self, sequence: Sequence) -> Table:
        """Cached blocks that the sequence can begin with: full ones, and never all of its tokens.

        Nor any beyond where others fork from it: no block that can be found is ever written. A request that reports
        its prompt's logprobs has to compute every row.
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
        self.num_hit_tokens += num_hit
        self.num_looked_up_tokens += sequence.num_tokens
        if not sequence.num_preemptions and not sequence.num_output_tokens:
            sequence.num_cached_tokens = num_hit

    def _enter(self, sequence: Sequence) -> None:
        sequence.transition_to(SequenceState.RUNNING)
        if sequence.first_scheduled_s is None:
            sequence.first_scheduled_s = self.now
        insort(self.running, sequence, key=lambda running: running.queue_number)
        self.admitted.append(sequence)
        self._manager.events.append(("run", sequence.sequence_id))

    def _start(self, sequence: Sequence) -> None:
        """Schedule one that has just come in, and that there is room for."""
        start = sequence.num_computed_tokens
        num_tokens = self._num_next(sequence, self.budget)
        self._manager.reserve(sequence.sequence_id, start, start + num_tokens)
        self._schedule(sequence, num_tokens)

    def _schedule(self, sequence: Sequence, num_tokens: int) -> None:
        start = sequence.num_computed_tokens
        end = start + num_tokens
        self.budget -= num_tokens
        self.scheduled.append((sequence, num_tokens))
        sequence.last_step = self.index
        block_size = self._manager.block_size
        if start // block_size < end // block_size and self._scheduler.enable_prefix_caching:
            chain = sequence.hash_chain(block_size)
            num_known = min(end // block_size, len(chain))
            self._manager.publish(sequence.sequence_id, chain, start // block_size, num_known)
        is_leader = sequence.num_common_tokens > 0 and sequence.leader is sequence
        if is_leader and end >= sequence.num_common_tokens:
            self._fork(sequence)

    def _fork(self, sequence: Sequence) -> None:
        """Fork the sequences that wait for this one: all beams, or as many samples as there is room for."""
        children = sequence.to_fork
        if sequence.search is None:
            places = min(self._num_places(), self._num_left_of_share(sequence))
            # In the next step each writes to a block of its own, so each needs one spare block.
            room = 0 if self._closed or self.swapped else min(places, self._manager.num_spare_blocks)
            children, rest = children[: max(0, room)], children[max(0, room) :]
            self._scheduler.requeue(rest)
        self.forks[sequence.sequence_id] = children
        for child in children:
            self.waiting.remove(child)
            self._enter(child)
            self._manager.fork(sequence.sequence_id, child.sequence_id, sequence.num_common_tokens)
            child.fork_from(sequence, sequence.num_common_tokens, self._manager.block_size)
            child.last_step = self.index

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for ``num_tokens`` more, at the cost of the youngest; False where that is no way to get them."""
        start = sequence.num_computed_tokens
        while not self._manager.reserve(sequence.sequence_id, start, start + num_tokens):
            victims = list(self.running[-1].sequence_group)
            if any(victim.last_step == self.index for victim in victims):
                return False  # they have had their plan already; the sequence's own comes first in the next step
            self._preempt(victims)
            if sequence in victims:
                return False
        return True

    def _preempt(self, group: ReadOnlyList[Sequence]) -> None:
        """Take all of the group's blocks: to swap space, or if that is full or not wanted, for good."""
        for sequence in group:
            self.running.remove(sequence)
            sequence.num_preemptions += 1
        self.preempted += group
        stored = [(sequence.sequence_id, sequence.num_computed_tokens) for sequence in group]
        if self._scheduler.swaps and stored[0][1] and self._manager.swap_out(*stored):
            for sequence in group:
                sequence.transition_to(SequenceState.SWAPPED)
                insert_by_age(self.swapped, sequence)
                self._manager.events.append(("swap", sequence.sequence_id))
        else:
            for sequence in group:
                self._manager.free(sequence.sequence_id)
                self._scheduler.restart(sequence)
        self._scheduler.release_draining()
        self._closed = bool(self.running)


def sample_share(max_num_seqs: int) -> int:
    """The most places that the samples of one request hold at once: three quarters, rounded up; all but one below 4."""
    return max(1, max_num_seqs - max(1, max_num_seqs // 4))


def insert_by_age(queue: deque[Sequence], sequence: Sequence) -> None:
    """Queue one that was here before: ahead of all that came later, which is usually all there are."""
    place = 0
    for other in queue:
        if other.queue_number > sequence.queue_number:
            break
        place += 1
    queue.insert(place, sequence)
