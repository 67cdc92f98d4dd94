"""Attention backends by name: how queries read the paged cache.

A backend is a function of one layer's query and cache, and of the step that says which tokens belong to whom.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from paged_infer.cache.spec import StepMeta
from paged_infer.kernels.paged_attention import paged_attention_reference
from paged_infer.kernels.paged_attention_sdpa import paged_attention_batched


class AttentionBackend(Protocol):
    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, step: StepMeta, *, window: int | None
    ) -> Tensor:
        """q [T, H, D]; caches [num_blocks, block_size, H_kv, D] that already hold this step's tokens -> [T, H, D]."""
        ...


def torch_backend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: StepMeta, *, window: int | None
) -> Tensor:
    """The reference: one sequence after the other, readable, on any device."""
    return paged_attention_reference(
        q,
        k_cache,
        v_cache,
        block_tables=step.block_tables,
        seq_lens=step.seq_lens,
        query_start_loc=step.query_start_loc,
        window=window,
    )


ATTENTION_BACKENDS: dict[str, AttentionBackend] = {"torch": torch_backend, "sdpa": paged_attention_batched}


def attention_backend(name: str, device: torch.device) -> AttentionBackend:
    """The backend called ``name``; "auto" is the fastest one that ``device`` has.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name == "auto":
        name = "sdpa"
    if name not in ATTENTION_BACKENDS:
        raise ValueError(
            f"attention_backend={name!r} is not known; known: auto, {', '.join(ATTENTION_BACKENDS)}"
        )
    return ATTENTION_BACKENDS[name]
