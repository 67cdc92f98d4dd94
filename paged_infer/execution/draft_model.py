"""A small model that drafts for a large one: it runs every step first, then continues alone to produce the drafts.

    step           A: t7 + 3 places     B: 5 tokens of its prompt
    draft model    A: t7 -> a           B: the same 5          one forward pass of the known tokens, with its own cache,
                   A: a -> b                                   and one for each draft. The last one only stores
                   A: b -> c                                   keys and values: if all drafts are accepted, c is
                   A: c                                        not computed here again
    step, filled   A: t7 a b c          B: 5 tokens

Its cache mirrors the large model's pool: the same blocks, tables, copies and swaps. It computes every token that the
large model computes. So a block is in the same state in both (shared, found by its hash, swapped out or in), and no
second block manager is needed.

It samples with the sequence's own parameters and noise: where the two models' distributions are similar, so are the
samples. Two independent samples would be the same only with probability sum(p_i q_i), which is small even where p = q.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from paged_infer.cache.paged import PagedCache
from paged_infer.config import EngineConfig
from paged_infer.control.speculation import rows_after
from paged_infer.control.step import BlockTransfers, SamplingRow, ScheduledSequence, ScheduledStep
from paged_infer.execution.model_runner import ModelRunner
from paged_infer.kernels.op_sets import Ops
from paged_infer.model.decoder import Decoder
from paged_infer.model.loading.hub import resolve_model
from paged_infer.model.loading.load import load_decoder
from paged_infer.sampling.sampler import Sampler

logger = logging.getLogger(__name__)


def load_draft(config: EngineConfig, target: Decoder, ops: Ops) -> Decoder | None:
    """The decoder of ``config.speculation.model``, in the target's dtype and on its device; None without a draft model.

    Raises:
        ValueError: the checkpoint cannot be used, or its vocabulary is not the target's.
    """
    if config.speculation is None or config.speculation.model is None:
        return None
    folder = resolve_model(config.speculation.model)
    seed = config.seed if config.load_format == "dummy" else None
    draft = load_decoder(folder, target.dtype, target.device, ops, dummy_seed=seed, max_model_len=config.max_model_len)
    if draft.config.vocab_size != target.config.vocab_size:
        raise ValueError(
            f"speculative_config: model={str(folder)!r} has a vocabulary of {draft.config.vocab_size} tokens, "
            f"but the target model has one of {target.config.vocab_size}"
        )
    return draft


class DraftModel:
    """Fills in the drafts of scheduled steps; it gets every step before the ``ModelRunner`` does."""

    def __init__(self, decoder: Decoder, cache: PagedCache, sampler: Sampler) -> None:
        """``cache``: as many blocks of the same size as the target model's."""
        self.runner = ModelRunner(decoder, cache, sampler)
        self._has_warned = False

    def fill_in(self, step: ScheduledStep) -> ScheduledStep:
        """The step with its drafts filled in. The draft model computes all of its tokens, too.

        If the draft model's logits contain NaN or +inf, the draft is token 0. A wrong draft only slows its
        sequence down.

        The host waits for each draft: a step lists the tokens that it verifies.
        """
        drafting = [sequence for sequence in step.sequences if sequence.num_drafts]
        drafts: dict[int, list[int]] = {sequence.sequence_id: [] for sequence in drafting}
        now, transfers = [_known(sequence) for sequence in step.sequences], step.transfers
        while now:
            result = self.runner.execute(ScheduledStep(step.index, now, transfers))
            if result.failed and not self._has_warned:
                logger.warning("the draft model's logits contain NaN or +inf: token 0 is drafted instead")
                self._has_warned = True
            sampled = result.token_ids
            for sequence_id, token_id in sampled.items():
                drafts[sequence_id].append(max(0, token_id))
            now = [_after_drafts(s, drafts[s.sequence_id]) for s in drafting if s.sequence_id in sampled]
            transfers = BlockTransfers()
        filled = [
            replace(s, token_ids=[*s.token_ids[: s.num_known_tokens], *drafts[s.sequence_id]]) if s.num_drafts else s
            for s in step.sequences
        ]
        return replace(step, sequences=filled)


def _known(sequence: ScheduledSequence) -> ScheduledSequence:
    """The sequence without its drafts; it samples the first of them."""
    return ScheduledSequence(
        sequence.sequence_id,
        sequence.token_ids[: sequence.num_known_tokens],
        sequence.num_computed_tokens,
        sequence.block_table,
        sequence.sample if sequence.num_drafts else None,
    )


def _after_drafts(sequence: ScheduledSequence, drafts: list[int]) -> ScheduledSequence:
    """A step of the latest draft alone, which samples the next one unless it is the last."""
    assert isinstance(sequence.sample, SamplingRow)
    is_last = len(drafts) == sequence.num_drafts
    return ScheduledSequence(
        sequence.sequence_id,
        drafts[-1:],
        sequence.num_computed_tokens + sequence.num_known_tokens + len(drafts) - 1,
        sequence.block_table,
        None if is_last else rows_after(sequence.sample, drafts)[-1],
    )
