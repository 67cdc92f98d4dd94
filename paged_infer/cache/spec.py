"""The interface between decoders and caches: the shape of a cache entry, and how it is stored and read."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass
from typing import Protocol, Unpack, runtime_checkable

import torch
from torch import Tensor

from paged_infer.kernels.attention.metadata import AttentionMetadata, ScoreOptions


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The cache entry of one token in one layer."""

    num_kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None  # tokens that a query sees, its own included; None: all up to its own
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.num_kv_heads * (self.k_dim + self.v_dim) * self.dtype.itemsize


def kv_bytes_per_token(spec: ReadOnlyList[LayerSpec]) -> int:
    """Bytes in all layers: 2 * layers * kv_heads * head_dim * bytes per element, where layers are equal."""
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

    def slots(self, layer: int, step: AttentionMetadata) -> dict[str, Tensor]:
        """The arguments ``k_cache``, ``v_cache`` and ``slot_mapping`` of ``kernels.qk_norm_rope``.

        A caller that stores there calls ``attend_stored`` next, instead of ``attend``.
        """
        ...

    def attend_stored(self, layer: int, q: Tensor, step: AttentionMetadata, **scores: Unpack[ScoreOptions]) -> Tensor:
        """``attend`` without the store."""
        ...
