"""One request's life, and the life of each of its samples.

    WAITING --admitted--> RUNNING --last token--> FINISHED
       ^                    | ^                      ^
       +---- preempted -----+ |       abort ---------+  (from any state)
             or else        v |
                          SWAPPED        its blocks lie in swap space, and nothing has to be computed again

A sequence is one sample of a request: a list of tokens of which the first ``num_computed_tokens`` have their keys and
values in the cache. Prefill, a chunk of it, decode, and recomputation after a preemption are the same act: compute
some more of the tokens that are known; when the last known one has been computed, one more is drawn.

What several sequences of a request know in common is computed once, by the first of them: at first that is the prompt.
Beams then start together. Samples start as ``max_num_seqs`` and the pool allow; a later one takes the prompt from the
prefix cache, or computes it again.
A token that has been drawn and not yet been read (it may still be on its way from a GPU) has its place among the tokens
as ``PLACEHOLDER``: the next step can be planned with it, but not a hash, nor a text.

The beams of a search need each other at every token. They run together and are preempted together, as a *sequence
group* (Kwon et al. 2023, section 4.5). Otherwise one beam could hold the blocks that another of the group waits for.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, field

from paged_infer.control.beam_search import Answer, BeamSearch
from paged_infer.control.blocks.hashing import extend_chain, root_hash
from paged_infer.params import BeamSearchParams, SamplingParams

PLACEHOLDER = -1  # a token whose value is not known yet


class SequenceState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


_TRANSITIONS = {
    SequenceState.WAITING: {SequenceState.RUNNING, SequenceState.FINISHED},
    SequenceState.RUNNING: {SequenceState.WAITING, SequenceState.SWAPPED, SequenceState.FINISHED},
    SequenceState.SWAPPED: {SequenceState.RUNNING, SequenceState.WAITING, SequenceState.FINISHED},
    SequenceState.FINISHED: set(),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample or beam of a request. Identity is its own: two sequences are never equal."""

    sequence_id: int
    request_id: str
    sample_index: int
    params: SamplingParams
    seed: int
    token_ids: list[int]  # prompt, then output
    num_prompt_tokens: int
    max_total_tokens: int  # prompt and output together: max_tokens and max_model_len, whichever is less
    eos_token_ids: frozenset[int]
    arrival_time_s: float = 0.0  # of its request
    cache_root: bytes = b""  # where its chain of block hashes begins: the request's cache salt
    siblings: ReadOnlyList[Sequence] = field(default=(), repr=False)  # all samples of its request, itself included
    search: BeamSearch | None = field(default=None, repr=False)  # the one that it is a beam of
    num_common_tokens: int = 0  # first tokens that await being computed once for all siblings; 0 when that is done
    queue_number: int = 0  # its position in the arrival order; see Scheduler.requeue
    block_hashes: list[bytes] = field(default_factory=list, repr=False)
    state: SequenceState = SequenceState.WAITING
    num_computed_tokens: int = 0
    num_placeholders: int = 0  # the last so many of its tokens are not known yet
    may_draft: bool = True  # not where it could not go on with drafts, which may be why
    last_step: int = 0  # index of the newest step that it was scheduled in
    num_cached_tokens: int = 0  # prompt tokens that the prefix cache had when it was first admitted
    num_preemptions: int = 0
    first_scheduled_s: float | None = None  # on the clock of its request's times
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # why it failed, where ``finish_reason`` is "error"
    cumulative_logprob: float = 0.0  # of a beam
    score: float | None = None  # of a beam that has become an answer

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_known_tokens(self) -> int:
        return len(self.token_ids) - self.num_placeholders

    @property
    def num_output_tokens(self) -> int:
        return self.num_known_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens : self.num_known_tokens]

    @property
    def is_finished(self) -> bool:
        return self.state is SequenceState.FINISHED

    @property
    def is_length_capped(self) -> bool:
        """Whether it ends with the token that is pending, whatever that is."""
        return self.num_placeholders > 0 and len(self.token_ids) >= self.max_total_tokens

    @property
    def to_fork(self) -> list[Sequence]:
        """Those that wait to begin where the tokens end that this one computes for them: all siblings that live.

        Empty for all but the first of those that live: they are themselves to be forked.
        """
        if not self.num_common_tokens or self.leader is not self:
            return []
        waiting = (s for s in self.siblings if s is not self and s.state is SequenceState.WAITING)
        return [s for s in waiting if s.num_common_tokens]

    @property
    def leader(self) -> Sequence:
        """The sequence that computes the common tokens: the first live sibling that waits for them, or itself."""
        if not self.num_common_tokens:
            return self
        return next(s for s in self.siblings if s.num_common_tokens and not s.is_finished)

    @property
    def sequence_group(self) -> ReadOnlyList[Sequence]:
        """Who comes in and is preempted with this one: itself, or the beams of its search once they have parted."""
        return (self,) if self.search is None or self.num_common_tokens else self.siblings

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end this sequence once ``min_tokens`` are out."""
        eos = () if self.params.ignore_eos else tuple(sorted(self.eos_token_ids))
        return (*eos, *self.params.stop_token_ids)

    def hash_chain(self, block_size: int) -> list[bytes]:
        """The hash of each full block of known tokens; only those that are new since the last call are computed."""
        extend_chain(self.block_hashes, self.cache_root, self.token_ids, block_size, self.num_known_tokens)
        return self.block_hashes

    def transition_to(self, state: SequenceState) -> None:
        if state not in _TRANSITIONS[self.state]:
            raise RuntimeError(f"sequence {self.sequence_id} cannot go from {self.state.value} to {state.value}")
        self.state = state

    def restart(self) -> None:
        """Back to waiting; its blocks are gone, so everything known is to be computed again."""
        self.transition_to(SequenceState.WAITING)
        self.num_computed_tokens = 0
        if self.search is not None and not self.num_common_tokens:
            self.num_common_tokens = num_common_tokens(self.siblings)

    def fork_from(self, parent: Sequence, num_tokens: int, block_size: int) -> None:
        """Its first ``num_tokens`` tokens are those of ``parent``, who has them computed."""
        self.num_computed_tokens = num_tokens
        self.block_hashes = parent.block_hashes[: num_tokens // block_size]  # further on, the two may differ

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        self.drop_placeholders()
        self.transition_to(SequenceState.FINISHED)
        self.finish_reason, self.stop_reason = reason, stop_reason

    def append_output_token(self, token_id: int) -> tuple[str, int | None] | None:
        """Take one more token. Returns (finish reason, stop token) if it was the last, None if more are to come.

        The reason is only reported: to finish is for whoever owns the sequence's blocks.
        """
        self.append_placeholder()
        return self.resolve_placeholder(token_id)

    def append_placeholder(self) -> None:
        """One more token has been drawn, and will be known later."""
        self.token_ids.append(PLACEHOLDER)
        self.num_placeholders += 1

    def resolve_placeholder(self, token_id: int) -> tuple[str, int | None] | None:
        """The first of those that are pending is ``token_id``; returns what ``append`` does."""
        ended = self.check_stop(token_id)
        self.token_ids[-self.num_placeholders] = token_id
        self.num_placeholders -= 1
        return ended

    def append_output_tokens(self, token_ids: ReadOnlyList[int]) -> tuple[int, tuple[str, int | None] | None]:
        """The first that is pending, and any that follow it, up to one that ends the sequence.

        Returns how many it took, and what ``append`` does.
        """
        ended = self.resolve_placeholder(token_ids[0])
        num_taken = 1
        while ended is None and num_taken < len(token_ids):
            ended = self.append_output_token(token_ids[num_taken])
            num_taken += 1
        return num_taken, ended

    def drop_last(self, num_tokens: int) -> None:
        """Its last tokens are not wanted: what it said before them ends it."""
        del self.token_ids[len(self.token_ids) - num_tokens :]

    def drop_placeholders(self) -> None:
        """Whatever is on its way is not wanted any more."""
        del self.token_ids[self.num_known_tokens :]
        self.num_placeholders = 0

    def check_stop(self, token_id: int) -> tuple[str, int | None] | None:
        """How ``token_id`` would end it as the next token that is known; None if more were to come."""
        num_tokens = len(self.token_ids) - self.num_placeholders + 1
        if num_tokens - self.num_prompt_tokens >= self.params.min_tokens:
            if token_id in self.eos_token_ids and not self.params.ignore_eos:
                return "stop", None
            if token_id in self.params.stop_token_ids:
                return "stop", token_id
        if num_tokens >= self.max_total_tokens:
            return "length", None
        return None

    def become(self, answer: Answer) -> None:
        """A search is over: who was a beam is now one of its answers."""
        self.token_ids = answer.token_ids
        self.cumulative_logprob, self.score = answer.cumulative_logprob, answer.score


def num_common_tokens(beams: ReadOnlyList[Sequence]) -> int:
    """How many first tokens all beams have in common: at least their prompt. 0 for one alone."""
    if len(beams) < 2:
        return 0
    columns = zip(*(beam.token_ids for beam in beams), strict=True)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), len(beams[0].token_ids))


@dataclass(slots=True, eq=False)
class Request:
    """What one caller asked for: a prompt, and ``n`` samples or the best beams of what follows.

    Times: the caller's clock, seconds.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time_s: float
    cache_salt: str | None = None  # only requests of the same salt share blocks through the prefix cache
    beam_params: BeamSearchParams | None = None  # a beam search's, whose ``limits`` are then the ``params``
    sequences: list[Sequence] = field(default_factory=list)
    first_token_time_s: float | None = None
    finished_time_s: float | None = None

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)

    @property
    def error(self) -> str | None:
        """Why the request failed, or None."""
        return next((sequence.error for sequence in self.sequences if sequence.error is not None), None)

    def add_sequences(
        self, first_sequence_id: int, seed: int, max_model_len: int, eos_token_ids: ReadOnlyList[int]
    ) -> None:
        """One sequence a sample or beam, each with its own copy of the prompt's ids to grow."""
        num_prompt = len(self.prompt_token_ids)
        root = root_hash(self.cache_salt)
        search = None if self.beam_params is None else BeamSearch(self.beam_params, self.sequences)
        wanted = max_model_len if self.params.max_tokens is None else num_prompt + self.params.max_tokens
        for index in range(self.params.n):
            self.sequences.append(
                Sequence(
                    sequence_id=first_sequence_id + index,
                    request_id=self.request_id,
                    sample_index=index,
                    params=self.params,
                    seed=seed,
                    token_ids=list(self.prompt_token_ids),
                    num_prompt_tokens=num_prompt,
                    max_total_tokens=min(wanted, max_model_len),
                    eos_token_ids=frozenset(eos_token_ids),
                    arrival_time_s=self.arrival_time_s,
                    cache_root=root,
                    siblings=self.sequences,
                    search=search,
                    num_common_tokens=num_prompt if self.params.n > 1 else 0,
                )
            )
