"""SequenceView: what a running sequence has in the cache, and what the model computes for its last token."""

from __future__ import annotations

import torch
from torch import Tensor

from paged_infer.cache.read_only import ReadOnlyCache
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.sequence import Sequence
from paged_infer.execution.model_runner import ModelRunner


class SequenceView:
    """One sample or beam between two steps; a later step makes it out of date.

    N tokens are computed, so their keys and values are stored. The model has H query heads and H_kv key heads of D
    elements, and V tokens in its vocabulary. With MLA a key is a latent: H_kv = 1, and its values are part of it.
    ``logits`` and ``attention_weights`` compute the last of the N tokens again: on a CPU in float32 to the same bits.

    Attributes:
        state: "waiting", "running" or "swapped".
        token_ids: the prompt, and the output so far.
        num_prompt_tokens: how many of them are the prompt.
        num_computed_tokens: N. In a running sequence that decodes, all but the last one.
        block_table: physical blocks: token i is in ``block_table[i // block_size]``, at ``i % block_size``.
        priority: of its request.

    Raises:
        RuntimeError: from ``keys``, ``values``, ``logits`` and ``attention_weights`` once the view is out of date.
        ValueError: from the same if nothing of the sequence is stored: it is waiting or swapped out.
    """

    def __init__(self, sequence: Sequence, manager: BlockManager, runner: ModelRunner) -> None:
        self._sequence, self._manager, self._runner = sequence, manager, runner
        self.state = sequence.state.value
        self.token_ids = sequence.token_ids[: sequence.num_known_tokens]
        self.num_prompt_tokens, self.priority = sequence.num_prompt_tokens, sequence.priority
        self.num_computed_tokens = min(sequence.num_computed_tokens, sequence.num_known_tokens)
        self.block_table = manager.table(sequence.sequence_id)
        self._when = self._state()

    def __repr__(self) -> str:
        one = self._sequence
        return (
            f"<SequenceView of request {one.request_id!r}, sample {one.sample_index}: {self.state}, "
            f"{self.num_computed_tokens} of {len(self.token_ids)} tokens computed, block_table={self.block_table}>"
        )

    def keys(self, layer: int) -> Tensor:
        """[N, H_kv, D], gathered through the block table, rotated, and dequantised if the cache is quantised."""
        return self._read(layer)[0]

    def values(self, layer: int) -> Tensor:
        """[N, H_kv, D], as ``keys``."""
        return self._read(layer)[1]

    @property
    def logits(self) -> Tensor:
        """[V], for the token after the N computed ones: the model's own, without penalty, mask or temperature."""
        self._check()
        return self._compute(ReadOnlyCache(self._runner.cache, self.block_table))

    def attention_weights(self, layer: int) -> Tensor:
        """[H, N]: how much each head of the last computed token attends to each token.

        The weights of a head sum to 1, or to less if the model has attention sinks. Beyond a sliding window they are 0.
        """
        self._check(layer)
        cache = ReadOnlyCache(self._runner.cache, self.block_table, (layer,))
        self._compute(cache)
        return cache.weights[layer].clone()

    def _read(self, layer: int) -> tuple[Tensor, Tensor]:
        self._check(layer)
        return self._runner.cache.read(layer, self.block_table, self.num_computed_tokens)

    def _compute(self, cache: ReadOnlyCache) -> Tensor:
        """Compute the last of the N tokens again, in a step of its own."""
        step, decoder = cache.step(self.num_computed_tokens), self._runner.decoder
        token = torch.tensor([self.token_ids[self.num_computed_tokens - 1]], device=decoder.device)
        return decoder.logits(decoder(token, cache, step))[0].clone()

    def _state(self) -> tuple[object, ...]:
        one = self._sequence
        return one.state, one.num_computed_tokens, one.num_known_tokens, self._manager.table(one.sequence_id)

    def _check(self, layer: int = 0) -> None:
        if self._when != self._state():
            raise RuntimeError("the sequence has changed since inspect(): call it again after each step")
        if not self.block_table or not self.num_computed_tokens:
            raise ValueError(f"nothing of the sequence is in the pool: it is {self.state}")
        if not 0 <= layer < (num := len(self._runner.cache.spec)):
            raise ValueError(f"layer={layer!r}: must be within [0, {num - 1}]")
