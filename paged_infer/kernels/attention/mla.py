"""Attention over the latents of MLA (DeepSeek-V2, 2024, section 2.1): the contract of its kernels, and the references.

Absorbed queries of all H heads read one latent of a token, which is key and, in its first Dv elements, value:

    q [B, H, Dk]  x  cache [num_blocks, block_size, 1, Dk]  ->  [B, H, Dv]          Dk = 576, Dv = 512 in DeepSeek's

In a quantised cache (``kv_quant``), a latent is 8-bit codes with two scales, for its first Dv elements and the others:

    cache [num_blocks, block_size, 1, Dk]     latent_scale, rest_scale [num_blocks, block_size, 1] float16

This is MQA, wider than the other kernels' heads, and each latent is read once for H dot products and H sums. The
expanded form, for prompts, is plain attention of dense heads, by the existing kernels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_infer.kernels.attention.checks import MAX_HEAD_DIM
from paged_infer.kernels.attention.flash_attention import causal_mask, flash_attention, flash_attention_reference
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.attention.paged_sdpa import masked_sdpa
from paged_infer.kernels.kv_quant import dequantise_latents

logger = logging.getLogger(__name__)

LATENT_SCALES = ("latent_scale", "rest_scale")  # for a latent's first Dv elements, and for the others


class LatentDecode(Protocol):
    def __call__(
        self, q: Tensor, cache: Tensor, step: AttentionMetadata, *, v_dim: int, scale: float,
        latent_scale: Tensor | None = None, rest_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """q [B, H, Dk], one query for each row of ``step``; cache [num_blocks, block_size, 1, Dk] -> [B, H, Dv].

        ``latent_scale`` and ``rest_scale`` are given only for a quantised cache.

        A row of length 0 pads a CUDA graph's batch; its output may be anything.
        """
        ...


class LatentBackend(NamedTuple):
    """What an attention backend computes MLA with."""

    decode: LatentDecode  # absorbed
    dense: Callable[[Tensor, Tensor, Tensor, float], Tensor]  # expanded: a ``cache.spec.DenseAttention``


def latent_decode_reference(
    q: Tensor, cache: Tensor, step: AttentionMetadata, *, v_dim: int, scale: float,
    latent_scale: Tensor | None = None, rest_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``LatentDecode`` in plain torch, one row at a time, of any width."""
    out = q.new_zeros(*q.shape[:2], v_dim)
    wide = torch.promote_types(q.dtype, torch.float32)
    for row, length in enumerate(step.seq_lens.tolist()):
        slots = slots_of(step, row, length, cache.shape[1])
        keys = latents_at(cache, slots, v_dim, q.dtype, latent_scale, rest_scale).to(wide)  # [length, Dk]
        weights = (q[row].to(wide) @ keys.T * scale).softmax(-1)  # [H, length]
        out[row] = (weights @ keys[:, :v_dim]).to(q.dtype)
    return out


def latents_at(
    cache: Tensor, slots: Tensor, v_dim: int, dtype: torch.dtype, latent_scale: Tensor | None, rest_scale: Tensor | None
) -> Tensor:
    """The latents in slots [M] of the cache: [M, Dk]; quantised ones are dequantised to ``dtype``."""
    latents = cache.flatten(0, 2).index_select(0, slots)
    if latent_scale is None or rest_scale is None:
        return latents
    first, rest = (scale.flatten().index_select(0, slots) for scale in (latent_scale, rest_scale))
    return dequantise_latents(latents, v_dim, first, rest, dtype)


def slots_of(step: AttentionMetadata, row: int, length: int, block_size: int) -> Tensor:
    """Slots of a row's first ``length`` tokens, in a cache without its division into blocks: [length] int64."""
    token = torch.arange(length, device=step.block_tables.device)
    return step.block_tables[row, token // block_size].long() * block_size + token % block_size


def dense_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [B, H, N, D], k and v [B, H, M, D] -> [B, H, N, D]; as ``flash_attention_reference``, of any width."""
    return flash_attention_reference(q, k, v, scale=scale) if _fits(q) else dense_sdpa(q, k, v, scale)


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same by torch's fused attention."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    mask = None if num_queries == num_keys else causal_mask(num_queries, num_keys, None, q.device)
    return masked_sdpa(q, k, v, mask, scale=scale)


def dense_triton(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same by ``flash_attention``."""
    return flash_attention(q, k, v, scale=scale) if _fits(q) else dense_sdpa(q, k, v, scale)


def _fits(q: Tensor) -> bool:
    if q.shape[-1] <= MAX_HEAD_DIM:
        return True
    warn_once(f"prompts use torch's attention: MLA's heads have {q.shape[-1]} elements, the kernels' {MAX_HEAD_DIM}")
    return False


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)


@dataclass(frozen=True, slots=True)
class LatentPlan:
    """Which form computes which tokens of a step; the same for all layers."""

    rows: AttentionMetadata | None  # of the absorbed tokens, each a row of its own; None: there are none
    tokens: Tensor | None  # [B] their places in the step; None: all, in order
    chunks: list[tuple[slice, Tensor]]  # expanded: tokens of a sequence, and the slots of its latents


def plan_latent(step: AttentionMetadata, block_size: int, expands: Callable[[int, int], bool]) -> LatentPlan:
    """The form depends on a sequence's own numbers of queries and tokens, not on the other sequences.

    The plan of a decode step is the step itself. In other steps the host waits for the lengths, once.
    """
    if step.max_query_len == 1:
        return LatentPlan(step, None, [])
    bounds, lengths, device = step.query_start_loc.tolist(), step.seq_lens.tolist(), step.seq_lens.device
    chunks: list[tuple[slice, Tensor]] = []
    absorbed: list[tuple[int, int, int]] = []  # tokens that it attends to, its index, its sequence
    for row, length in enumerate(lengths):
        first, end = bounds[row], bounds[row + 1]
        if expands(end - first, length):
            chunks.append((slice(first, end), slots_of(step, row, length, block_size)))
        else:
            absorbed += [(length - end + token + 1, token, row) for token in range(first, end)]
    if not absorbed:
        return LatentPlan(None, None, chunks)
    absorbed.sort(reverse=True)  # the longest first, as in a decode step
    seen, tokens, owners = torch.tensor(absorbed, device=device).T
    rows = AttentionMetadata(
        positions=step.positions[:0],
        slot_mapping=step.slot_mapping[:0],
        query_start_loc=torch.arange(len(absorbed) + 1, dtype=torch.int32, device=device),
        seq_lens=seen.int(),
        block_tables=step.block_tables[owners],
        num_decodes=len(absorbed),
        max_query_len=1,
        max_seq_len=absorbed[0][0],
    )
    return LatentPlan(rows, tokens, chunks)


def pad_heads(x: Tensor, width: int) -> Tensor:
    """x [.., D] with zeros up to ``width``, for kernels whose keys and values are equally wide."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
