"""NoCache: the cache of the naive baseline. It keeps nothing, so each step computes whole sequences again."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from itertools import pairwise
from typing import Unpack

import torch
from torch import Tensor

from paged_infer.cache.spec import LatentForms, LayerSpec
from paged_infer.kernels.attention.flash_attention import flash_attention_reference
from paged_infer.kernels.attention.metadata import AttentionMetadata, ScoreOptions
from paged_infer.kernels.attention.mla import dense_reference


class NoCache:
    """Attention over the tokens of one step, which holds whole sequences, packed one after another."""

    def __init__(self, spec: ReadOnlyList[LayerSpec]) -> None:
        self.spec = spec

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: AttentionMetadata, **scores: Unpack[ScoreOptions]
    ) -> Tensor:
        """q [T, H, D], k and v [T, H_kv, D] -> [T, H, D]."""
        out = torch.empty_like(q)
        bounds = step.query_start_loc.tolist()
        for start, end in pairwise(bounds):
            heads_first = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, N, D]
            dense = flash_attention_reference(*heads_first, window=self.spec[layer].window, **scores)
            out[start:end] = dense[0].transpose(0, 1)
        return out

    def attend_latent(
        self, layer: int, q: Tensor, latent: Tensor, step: AttentionMetadata, forms: LatentForms
    ) -> Tensor:
        """As in the definition of MLA: each sequence expanded. q [T, H, n + p], latent [T, 1, r + p] -> [T, H, v]."""
        sequences = pairwise(step.query_start_loc.tolist())
        whole = [(q[None, start:end], latent[start:end].transpose(0, 1)) for start, end in sequences]
        return torch.cat([forms.attend_expanded(*sequence, dense_reference)[0] for sequence in whole])
