"""The interface between decoders and caches: the shape of a cache entry, and how it is stored and read."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass
from typing import Protocol, Unpack, runtime_checkable

import torch
from torch import Tensor

from paged_infer.kernels.attention.metadata import AttentionMetadata, ScoreOptions
from paged_infer.kernels.kv_quant import LARGEST_CODE, SCALE_BYTES


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The cache entry of one token in one layer."""

    num_kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None  # tokens that a query sees, its own included; None: all up to its own
    dtype: torch.dtype  # as stored
    v_in_k: bool = False  # a value is the first v_dim elements of its key, which alone is stored (MLA)

    @property
    def has_scales(self) -> bool:
        """Whether each vector is stored as 8-bit codes and one float16 scale (``kernels.kv_quant``).

        With ``v_in_k``, the value and the rest of the key are two vectors.
        """
        return self.dtype in LARGEST_CODE

    @property
    def bytes_per_token(self) -> int:
        elements = self.k_dim + (0 if self.v_in_k else self.v_dim)
        return self.num_kv_heads * (elements * self.dtype.itemsize + 2 * SCALE_BYTES * self.has_scales)


def kv_bytes_per_token(spec: ReadOnlyList[LayerSpec]) -> int:
    """Bytes in all layers: 2 * layers * kv_heads * head_dim * bytes per element, where layers are equal.

    For a quantised cache: 2 * layers * kv_heads * (head_dim + 2), with the scales.
    """
    return sum(layer.bytes_per_token for layer in spec)


class Cache(Protocol):
    """Stores keys and values, and computes attention over them."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: AttentionMetadata, **scores: Unpack[ScoreOptions]
    ) -> Tensor:
        """Store k [T, H_kv, k_dim] and v [T, H_kv, v_dim]; causal attention of q [T, H, k_dim] -> [T, H, v_dim].

        Args:
            scores: only what the model sets. A cache for models that set nothing may leave it out.
        """
        ...


@runtime_checkable
class SlottedCache(Cache, Protocol):
    """A cache to which the kernel that computes the keys can store directly, which saves one launch per layer."""

    def slots(self, layer: int, step: AttentionMetadata) -> dict[str, Tensor] | None:
        """The arguments ``k_cache``, ``v_cache`` and ``slot_mapping`` of ``kernels.qk_norm_rope``.

        A caller that stores there calls ``attend_stored`` next, instead of ``attend``. None: call ``attend``, as what
        is stored is not what is computed.
        """
        ...

    def attend_stored(self, layer: int, q: Tensor, step: AttentionMetadata, **scores: Unpack[ScoreOptions]) -> Tensor:
        """``attend`` without the store."""
        ...


DenseAttention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Causal attention: q [B, H, N, D], k and v [B, H, M, D], the factor of the scores -> [B, H, N, D].

The queries are the last N of M tokens.
"""


class LatentForms(Protocol):
    """The two ways to compute one layer of MLA from queries q [T, H, n + p] and cached latents [.., r + p].

    Absorbed, queries enter the latent space, and all heads share the latents as keys, and their first r elements as
    values. Expanded, each head's keys and values are made from the latents. Both give the same result, [T, H, v].
    """

    v_dim: int  # r
    scale: float  # of the scores

    def expands(self, num_queries: int, length: int) -> bool:
        """Whether the last ``num_queries`` tokens of a sequence of ``length`` are computed expanded."""
        ...

    def absorb(self, q: Tensor) -> Tensor:
        """q [T, H, n + p] -> queries of the latents, [T, H, r + p]."""
        ...

    def leave(self, attended: Tensor) -> Tensor:
        """Latents that absorbed queries have attended to, [T, H, r] -> values [T, H, v]."""
        ...

    def attend_expanded(self, q: Tensor, latents: Tensor, dense: DenseAttention) -> Tensor:
        """q [B, N, H, n + p], latents [B, M, r + p] -> [B, N, H, v]; the queries are the last N of M tokens."""
        ...


@runtime_checkable
class LatentCache(Cache, Protocol):
    """A cache that chooses the form of MLA. Any other gets absorbed queries, as if the model had one key head."""

    def attend_latent(
        self, layer: int, q: Tensor, latent: Tensor, step: AttentionMetadata, forms: LatentForms
    ) -> Tensor:
        """Store latent [T, 1, r + p]; causal attention of q [T, H, n + p] -> [T, H, v]."""
        ...
