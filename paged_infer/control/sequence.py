"""One sequence: a sample or a beam of a request. Its states are in ``control.sequence_state``.

A sequence is a list of tokens of which the first ``num_computed_tokens`` have their keys and values in the cache.
Prefill, a chunk of it, decode, and recomputation after a preemption are the same act: compute some more of the known
tokens. When the last known token has been computed, one more is sampled.

Tokens that several sequences of a request have in common are computed once, by the first of them. At first that is the
prompt. Beams then start together. Samples start as ``max_num_seqs`` and the pool allow; a later one takes the prompt
from the prefix cache, or computes it again.

A token that has been sampled but not yet read (it may still be in transit from a GPU) is represented by a
``PLACEHOLDER``. The next step can be planned with it, but it cannot be hashed or decoded.

The beams of a search depend on each other at every token. They run together and are preempted together, as a *sequence
group* (Kwon et al. 2023, section 4.5). Otherwise one beam could hold the blocks that another of the group waits for.
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, field, fields

from paged_infer.control.blocks.hashing import extend_chain
from paged_infer.control.guided.grammar import GrammarError, Matcher
from paged_infer.control.reasoning import ReasoningMatcher
from paged_infer.control.sequence_state import TRANSITIONS, SequenceState
from paged_infer.params import SamplingParams

PLACEHOLDER = -1  # a token that is not known yet


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample or beam of a request. Compared by identity: two sequences are never equal."""

    sequence_id: int
    request_id: str
    sample_index: int
    params: SamplingParams
    seed: int
    token_ids: list[int]  # prompt, then output
    num_prompt_tokens: int
    max_total_tokens: int  # prompt and output together: the lower of max_tokens and max_model_len
    eos_token_ids: frozenset[int]
    arrival_time_s: float = 0.0  # of its request
    priority: int = 0  # of its request: lower is more urgent, for policies that read it
    cache_root: bytes = b""  # where its chain of block hashes begins: the request's cache salt
    siblings: ReadOnlyList[Sequence] = field(default=(), repr=False)  # all sequences of its request, itself included
    matcher: Matcher | None = None  # where its known output tokens are in its grammar, or in its reasoning
    is_beam: bool = False
    num_common_tokens: int = 0  # first tokens, still to be computed once for all siblings; then 0
    queue_number: int = 0  # its position in the arrival order; see Queues.requeue
    block_hashes: list[bytes] = field(default_factory=list, repr=False)
    state: SequenceState = SequenceState.WAITING
    num_computed_tokens: int = 0
    num_placeholders: int = 0  # at the end of its tokens
    has_hits: bool = False  # once some of its blocks were found in the prefix cache
    is_retried: bool = False  # it failed, perhaps because of hits or drafts: it is computed again without any
    last_step: int = 0  # index of the newest step that it was scheduled in
    num_cached_tokens: int = 0  # prompt tokens that the prefix cache had when it was first admitted
    num_preemptions: int = 0
    first_scheduled_s: float | None = None  # on the clock of its request's times
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # why it failed, if ``finish_reason`` is "error"
    cumulative_logprob: float = 0.0  # of a beam
    score: float | None = None  # of a beam that has become an answer

    def __getstate__(self) -> tuple[None, dict[str, object]]:
        """Without its matcher: an engine in another process has compiled the grammar for itself."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return None, values | {"matcher": None}

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
    def reasoning(self) -> ReasoningMatcher | None:
        """Where it is in its reasoning; None without ``reasoning_parser``, and for a beam."""
        return self.matcher if isinstance(self.matcher, ReasoningMatcher) else None

    @property
    def is_length_capped(self) -> bool:
        """Whether it ends with its last placeholder, whatever token that turns out to be."""
        return self.num_placeholders > 0 and len(self.token_ids) >= self.max_total_tokens

    @property
    def to_fork(self) -> list[Sequence]:
        """Siblings that wait to be forked from this one, at the end of the common tokens that it computes for them.

        Empty for all but the first live sibling: the others are themselves to be forked.
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
        """Sequences admitted and preempted with this one: itself, or the beams of its search once they differ."""
        return self.siblings if self.is_beam and not self.num_common_tokens else (self,)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end this sequence once it has ``min_tokens``."""
        eos = () if self.params.ignore_eos else tuple(sorted(self.eos_token_ids))
        return (*eos, *self.params.stop_token_ids)

    def hash_chain(self, block_size: int) -> list[bytes]:
        """The hash of each full block of known tokens. Computes only the hashes of blocks new since the last call."""
        extend_chain(self.block_hashes, self.cache_root, self.token_ids, block_size, self.num_known_tokens)
        return self.block_hashes

    def transition_to(self, state: SequenceState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"sequence {self.sequence_id} cannot go from {self.state.value} to {state.value}")
        self.state = state

    def restart(self) -> None:
        """Return to waiting without blocks: all known tokens have to be computed again."""
        self.transition_to(SequenceState.WAITING)
        self.num_computed_tokens = 0
        if self.is_beam and not self.num_common_tokens:
            self.num_common_tokens = num_common_tokens(self.siblings)

    def fork_from(self, parent: Sequence, num_tokens: int, block_size: int) -> None:
        """Start with the first ``num_tokens`` tokens of ``parent``, which have been computed."""
        self.num_computed_tokens = num_tokens
        self.has_hits, self.is_retried = parent.has_hits, parent.is_retried
        self.block_hashes = parent.block_hashes[: num_tokens // block_size]  # further on, the two may differ

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        self.drop_placeholders()
        self.transition_to(SequenceState.FINISHED)
        self.finish_reason, self.stop_reason = reason, stop_reason

    # -- tokens -----------------------------------------------------------------------------------------------------

    def append_placeholder(self) -> None:
        """One more token has been sampled, and its value will be known later."""
        self.token_ids.append(PLACEHOLDER)
        self.num_placeholders += 1

    def resolve_placeholder(self, token_id: int) -> tuple[str, int | None] | None:
        """The first placeholder is ``token_id``; returns what ``check_stop`` finds, or that its grammar is complete.

        Raises:
            GrammarError: the grammar does not allow the token.
        """
        ended = self.check_stop(token_id)
        if self.matcher is not None:
            if not self.matcher.accept(token_id):
                raise GrammarError(f"token {token_id} was sampled, which its grammar does not allow")
            if self.matcher.is_finished and (ended is None or ended[0] == "length"):
                ended = "stop", None
        self.token_ids[-self.num_placeholders] = token_id
        self.num_placeholders -= 1
        return ended

    def append_output_token(self, token_id: int) -> tuple[str, int | None] | None:
        """Append one more token; returns what ``resolve_placeholder`` does.

        It does not finish the sequence: that is up to the owner of its blocks.
        """
        self.append_placeholder()
        return self.resolve_placeholder(token_id)

    def append_output_tokens(self, token_ids: ReadOnlyList[int]) -> tuple[int, tuple[str, int | None] | None]:
        """Resolve the first placeholder and append the tokens after it, up to one that ends the sequence.

        Returns the number of tokens added, and what ``resolve_placeholder`` finds for the last of them.
        """
        ended = self.resolve_placeholder(token_ids[0])
        num_added = 1
        while ended is None and num_added < len(token_ids):
            ended = self.append_output_token(token_ids[num_added])
            num_added += 1
        return num_added, ended

    def drop_last(self, num_tokens: int) -> None:
        """Remove the last tokens: a stop string ended the text before them."""
        del self.token_ids[len(self.token_ids) - num_tokens :]
        if self.matcher is not None:
            self.matcher.rollback(num_tokens)

    def drop_placeholders(self) -> None:
        """Drop the tokens that have been sampled but not read."""
        del self.token_ids[self.num_known_tokens :]
        self.num_placeholders = 0

    def check_stop(self, token_id: int) -> tuple[str, int | None] | None:
        """(finish reason, stop token) if ``token_id`` as the next known token ends the sequence, else None."""
        num_tokens = len(self.token_ids) - self.num_placeholders + 1
        if num_tokens - self.num_prompt_tokens >= self.params.min_tokens:
            if token_id in self.eos_token_ids and not self.params.ignore_eos:
                return "stop", None
            if token_id in self.params.stop_token_ids:
                return "stop", token_id
        if num_tokens >= self.max_total_tokens:
            return "length", None
        return None


def num_common_tokens(beams: ReadOnlyList[Sequence]) -> int:
    """How many first tokens all beams have in common: at least their prompt. 0 for a single beam."""
    if len(beams) < 2:
        return 0
    columns = zip(*(beam.token_ids for beam in beams), strict=True)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), len(beams[0].token_ids))
