"""NoCache: the cache of the naive baseline. It keeps nothing, so each step computes whole sequences again."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from itertools import pairwise
from typing import Unpack

import torch
from torch import Tensor

from paged_infer.cache.spec import LayerSpec
from paged_infer.kernels.attention.flash_attention import flash_attention_reference
from paged_infer.kernels.attention.metadata import AttentionMetadata, ScoreOptions


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
