"""What one engine step computes: plain picklable data, made by the scheduler and run by an executor.

None of it is changed once it is made. It is not declared frozen because that makes creating it six times slower, and
one is created for every running sequence in every step.
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, field

from paged_infer.control.guided.token_mask import TokenMask
from paged_infer.outputs import TokenLogprobs
from paged_infer.params import SamplingParams

Candidates = ReadOnlyList[tuple[int, float]]
"""The most probable next tokens of one sequence, best first: (token id, logprob)."""


@dataclass(slots=True)
class SamplingRow:
    """How to sample the next token of one sequence: everything the sampler needs except the logits, picklable.

    Never changed once made; see ``control.step`` for why it is not declared frozen.

    Attributes:
        seed: of the request, or derived for it; any int64.
        sample_index: which of the request's ``n`` samples.
        position: index that the new token will have in the sequence, prompt included.
        num_output_tokens: how many tokens this sample has generated so far.
        end_token_ids: EOS and stop tokens, masked while ``num_output_tokens < params.min_tokens``.
        prompt_token_ids: filled only if ``params.needs_history``; so is ``output_token_ids``.
        mask: the tokens that its grammar or its budget of reasoning allows; None if nothing can be forbidden.
    """

    params: SamplingParams
    seed: int
    sample_index: int
    position: int
    num_output_tokens: int
    end_token_ids: tuple[int, ...] = ()
    prompt_token_ids: ReadOnlyList[int] = ()
    output_token_ids: ReadOnlyList[int] = ()
    mask: TokenMask | None = None

    @property
    def is_masked(self) -> bool:
        """Whether a token is forbidden."""
        return self.mask is not None and self.mask.bits is not None


@dataclass(slots=True)
class TopKRow:
    """Requests the ``num_top`` most probable next tokens of a beam, but none of ``banned_token_ids``."""

    num_top: int
    banned_token_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class ScheduledSequence:
    """Some more tokens of one sequence.

    Attributes:
        token_ids: the tokens to compute now. The last may be a ``PLACEHOLDER`` for what the step before samples. Drafts
            come after the known tokens; the draft model fills in those that are a ``PLACEHOLDER``.
        num_computed_tokens: how many tokens before them are in the cache; the position of the first of them.
        block_table: physical blocks, enough for all of these tokens.
        sample: how to sample the next token, or which candidates to rank for a beam; None while known tokens remain
            after these.
        num_prompt_logprobs: top tokens to report for each of ``next_prompt_token_ids``; None for no report.
        forks: sequences forked here, and how each samples its first token: from the same logits, with its own noise.
        next_prompt_token_ids: for that report, the prompt token that follows each of ``token_ids``.
        num_drafts: how many of ``token_ids``, at the end, are drafts; ``sample`` is for the token before them.
    """

    sequence_id: int
    token_ids: ReadOnlyList[int]
    num_computed_tokens: int
    block_table: ReadOnlyList[int]
    sample: SamplingRow | TopKRow | None
    forks: ReadOnlyList[tuple[int, SamplingRow]] = ()
    num_prompt_logprobs: int | None = None
    next_prompt_token_ids: ReadOnlyList[int] = ()
    num_drafts: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Those of ``token_ids`` that are not drafts."""
        return len(self.token_ids) - self.num_drafts

    @property
    def drafts(self) -> ReadOnlyList[int]:
        return self.token_ids[self.num_known_tokens :]


@dataclass(slots=True)
class BlockTransfers:
    """Whole blocks to move before a step computes: first all that go out, then all that come in, then the copies.

    Attributes:
        swap_outs: (block, swap block).
        swap_ins: (swap block, block).
        copies: (source, destination). All sources are read before any destination is written.
    """

    swap_outs: list[tuple[int, int]] = field(default_factory=list)
    swap_ins: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class ScheduledStep:
    """Everything that runs in one step, in the order in which it was scheduled.

    ``resume_at_s``: when to plan again (the caller's clock), if a policy waits for a batch to fill.
    """

    index: int
    sequences: list[ScheduledSequence]
    transfers: BlockTransfers = field(default_factory=BlockTransfers)
    resume_at_s: float | None = None

    @property
    def num_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self.sequences)

    @property
    def allows_async_scheduling(self) -> bool:
        """Whether the next step can be planned, and launched, before this one's tokens have been read.

        Not if the next sample depends on earlier tokens (penalties, a grammar, the caller's logits processors), if
        beams are ranked, if logprobs are reported, or if drafts are yet to be accepted.
        """
        for sequence in self.sequences:
            row = sequence.sample
            if isinstance(row, TopKRow) or sequence.num_prompt_logprobs is not None or sequence.num_drafts:
                return False
            if row is not None and (
                row.params.needs_history or row.params.logprobs is not None or row.mask is not None
            ):
                return False
        return True

    @property
    def sampling(self) -> list[int]:
        """Ids of the sequences that sample a token."""
        sampling = []
        for sequence in self.sequences:
            if isinstance(sequence.sample, SamplingRow):
                sampling.append(sequence.sequence_id)
                sampling += [sequence_id for sequence_id, _ in sequence.forks]
        return sampling

    @property
    def beam_rows(self) -> list[int]:
        """Ids of the beams that get candidates."""
        return [s.sequence_id for s in self.sequences if isinstance(s.sample, TopKRow)]


@dataclass(slots=True)
class StepResult:
    """What a step computed, by sequence id.

    NaN or +inf in the logits of a sequence raises nothing: it is in ``failed``, and the others are unaffected.

    Attributes:
        token_ids: the token that was sampled, for each of ``ScheduledStep.sampling``; -1 for a failed sequence.
        accepted: for each sequence that had drafts, those that equal the samples; ``token_ids`` has the next sample.
        logprobs: of each new token, if requested.
        prompt_logprobs: of prompt tokens, with the index of the first.
        candidates: for each of ``ScheduledStep.beam_rows``, its best next tokens.
        failed: why the sequence failed.
        expert_load: of each layer with experts, the tokens that each expert computed, if that is counted.
    """

    token_ids: dict[int, int] = field(default_factory=dict)
    accepted: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[int, list[TokenLogprobs]]] = field(default_factory=dict)
    candidates: dict[int, Candidates] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    expert_load: list[list[int]] = field(default_factory=list)
