"""What every cache and every decoder agree on: the shape of what is kept, and how it is stored and read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from paged_infer.kernels.attention.metadata import AttentionMetadata


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one token leaves in the cache of one layer."""

    num_kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None  # tokens a query sees, itself included; None: all before it
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.num_kv_heads * (self.k_dim + self.v_dim) * self.dtype.itemsize


def kv_bytes_per_token(spec: Sequence[LayerSpec]) -> int:
    """2 * layers * kv_heads * head_dim * bytes, for the usual case of equal layers."""
    return sum(layer.bytes_per_token for layer in spec)


class Cache(Protocol):
    """Remembers keys and values, and lets queries read them."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: AttentionMetadata) -> Tensor:
        """Keep k [T, H_kv, k_dim] and v [T, H_kv, v_dim]; return causal attention of q [T, H, k_dim]: [T, H, v_dim]."""
        ...


@runtime_checkable
class SlottedCache(Cache, Protocol):
    """A cache whose storing can be left to the kernel that makes the keys, which saves a launch a layer."""

    def slots(self, layer: int, step: AttentionMetadata) -> dict[str, Tensor]:
        """Where to store, as ``k_cache``, ``v_cache`` and ``slot_mapping`` of ``kernels.qk_norm_rope``.

        Who stores there calls ``attend_stored`` next, in place of ``attend``.
        """
        ...

    def attend_stored(self, layer: int, q: Tensor, step: AttentionMetadata) -> Tensor:
        """``attend`` without its first half."""
        ...
