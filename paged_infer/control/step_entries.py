"""From a sequence to the plain data that a step carries: its next tokens, and how to sample after the last of them."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList

from paged_infer.control.beam_search import num_candidates
from paged_infer.control.blocks.manager import Table
from paged_infer.control.guided.token_mask import TokenMask
from paged_infer.control.sequence import Sequence
from paged_infer.control.step import SamplingRow, ScheduledSequence, TopKRow


def step_entry(
    sequence: Sequence, num_tokens: int, table: Table, children: ReadOnlyList[Sequence], drafts: ReadOnlyList[int] = ()
) -> ScheduledSequence:
    """``num_tokens`` more of the sequence, the last of them ``drafts``. ``children`` are forked at their end."""
    start = sequence.num_computed_tokens
    end = start + num_tokens - len(drafts)
    num_prompt_logprobs: int | None = None
    next_prompt_token_ids: ReadOnlyList[int] = ()
    if sequence.params.prompt_logprobs is not None and sequence.sample_index == 0:
        next_prompt_token_ids = sequence.token_ids[start + 1 : min(end + 1, sequence.num_prompt_tokens)]
        num_prompt_logprobs = sequence.params.prompt_logprobs if next_prompt_token_ids else None
    sample: SamplingRow | TopKRow | None = None
    if end == len(sequence.token_ids):
        sample = top_k_row(sequence) if sequence.is_beam else sampling_row(sequence, len(drafts))
    return ScheduledSequence(
        sequence.sequence_id,
        [*sequence.token_ids[start:end], *drafts] if drafts else sequence.token_ids[start:end],
        start,
        table,
        sample,
        [(c.sequence_id, sampling_row(c)) for c in children] if children and not sequence.is_beam else (),
        num_prompt_logprobs,
        next_prompt_token_ids,
        len(drafts),
    )


def top_k_row(sequence: Sequence) -> TopKRow:
    """Which candidates to rank after a beam's last token."""
    ends = sequence.end_token_ids
    is_too_short = sequence.num_output_tokens < sequence.params.min_tokens
    return TopKRow(num_candidates(len(sequence.siblings), ends), ends if is_too_short else ())


def sampling_row(sequence: Sequence, num_drafts: int = 0) -> SamplingRow:
    """How to sample the sequence's next token. It holds the history only if that is needed.

    It has a mask if this token, one after a draft, or the next step's may be constrained, since a step may be planned
    before its tokens are known.
    """
    params, matcher = sequence.params, sequence.matcher
    num_ahead = sequence.num_placeholders + max(1, num_drafts)
    num_tokens, num_prompt = len(sequence.token_ids), sequence.num_prompt_tokens
    history = params.needs_history
    return SamplingRow(
        params,
        sequence.seed,
        sequence.sample_index,
        num_tokens,
        num_tokens - num_prompt,
        sequence.end_token_ids if params.min_tokens else (),
        sequence.token_ids[:num_prompt] if history else (),
        sequence.output_token_ids if history else (),
        TokenMask(matcher) if matcher is not None and matcher.constrains(num_ahead) else None,
    )
