"""ReadOnlyCache: recompute a stored token, to inspect its attention and its logits, without storing anything.

    cache   [ t0 t1 .. t8 ]          a step has stored t8
    again            t8              its queries see t0 .. t8 as they are stored, in the pool's own blocks

So a running sequence can be inspected between two steps without changing a block, shared or not.
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from paged_infer.cache.paged import PagedCache
from paged_infer.cache.spec import LatentForms
from paged_infer.kernels.attention.flash_attention import attention_weights
from paged_infer.kernels.attention.metadata import AttentionMetadata, ScoreOptions


class ReadOnlyCache:
    """A view of ``cache`` for one token: its backend attends, and nothing is stored.

    Attributes:
        weights: layer -> the attention weights of the token, [H, tokens]; only for the requested layers.
    """

    def __init__(self, cache: PagedCache, block_table: ReadOnlyList[int], layers: ReadOnlyList[int] = ()) -> None:
        self.cache, self.block_table, self.layers = cache, block_table, layers
        self.weights: dict[int, Tensor] = {}

    def step(self, num_tokens: int) -> AttentionMetadata:
        """The layout of a step of the last of a sequence's ``num_tokens`` stored tokens."""
        device = self.cache.keys[0].device

        def row(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return AttentionMetadata(
            positions=row(num_tokens - 1, dtype=torch.int64),
            slot_mapping=row(0, dtype=torch.int64),  # not used; a token with slot -1 would pass through no expert
            query_start_loc=row(0, 1),
            seq_lens=row(num_tokens),
            block_tables=row(*self.block_table)[None],
            num_decodes=1,
            max_query_len=1,
            max_seq_len=num_tokens,
        )

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: AttentionMetadata, **scores: Unpack[ScoreOptions]
    ) -> Tensor:
        """q [1, H, D] -> [1, H, D]. k and v are ignored, since they are stored already."""
        if layer in self.layers:
            window = self.cache.spec[layer].window
            self.weights[layer] = attention_weights(q, self._keys(layer, step), window=window, **scores)[:, 0]
        return self.cache.attend_stored(layer, q, step, **scores)

    def attend_latent(
        self, layer: int, q: Tensor, latent: Tensor, step: AttentionMetadata, forms: LatentForms
    ) -> Tensor:
        """q [1, H, n + p] -> [1, H, v], from the stored latents."""
        if layer in self.layers:
            weights = attention_weights(forms.absorb(q), self._keys(layer, step), scale=forms.scale)
            self.weights[layer] = weights[:, 0]
        unstored = replace(step, slot_mapping=torch.full_like(step.slot_mapping, -1))
        return self.cache.attend_latent(layer, q, latent, unstored, forms)

    def _keys(self, layer: int, step: AttentionMetadata) -> Tensor:
        return self.cache.read(layer, self.block_table, step.max_seq_len)[0]
