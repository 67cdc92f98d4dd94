"""An attention backend that records its weights, for experiments."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from paged_infer.kernels.attention.flash_attention import attention_weights
from paged_infer.kernels.attention.metadata import AttentionMetadata, ScoreOptions
from paged_infer.kernels.attention.mla import slots_of
from paged_infer.kernels.attention.paged_attention import paged_attention_reference, read_slots


class AttentionRecorder:
    """The reference backend, which keeps the attention weights of the latest step.

    ``register_attention_backend("recorder")(recorder)`` gives an object of this class a name for
    ``LLM(attention_backend=...)``. MLA has no backend of this form (``LATENT_BACKENDS``).

    Attributes:
        weights: layer -> [H, queries, tokens] for each sequence of the step, those with one query first.
    """

    def __init__(self) -> None:
        self.weights: dict[int, list[Tensor]] = {}

    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionMetadata, *, window: int | None, layer: int,
        k_scale: Tensor | None = None, v_scale: Tensor | None = None, **scores: Unpack[ScoreOptions],
    ) -> Tensor:  # fmt: skip
        bounds, tables = step.query_start_loc.tolist(), step.block_tables
        self.weights[layer] = []
        for row, length in enumerate(step.seq_lens.tolist()):
            keys = read_slots(k_cache, k_scale, slots_of(step, row, length, k_cache.shape[1]))
            queries = q[bounds[row] : bounds[row + 1]]
            self.weights[layer].append(attention_weights(queries, keys, window=window, **scores))
        return paged_attention_reference(
            q, k_cache, v_cache, window=window, block_tables=tables, seq_lens=step.seq_lens,
            query_start_loc=step.query_start_loc, k_scale=k_scale, v_scale=v_scale, **scores,
        )  # fmt: skip
