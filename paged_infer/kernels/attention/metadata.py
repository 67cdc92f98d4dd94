"""The metadata of one step that attention needs: which tokens it computes, and where their keys and values are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor


class ScoreOptions(TypedDict, total=False):
    """How some models change the scores. A model passes only those that it sets; None is the default of each."""

    scale: float | None  # the factor of the scores, above 0; None: 1/sqrt(k_dim)
    softcap: float | None  # above 0: scaled scores become softcap * tanh(scores / softcap), before the mask (Gemma 2)
    sinks: Tensor | None  # [H]: a learned logit per query head that joins the softmax's denominator (gpt-oss)


class AttentionOptions(ScoreOptions, total=False):
    """What a backend may get: how scores are changed, and the scales of a quantised cache (``kernels.kv_quant``)."""

    k_scale: Tensor | None  # [num_blocks, block_size, H_kv] float16; None: the cache is not quantised
    v_scale: Tensor | None


@dataclass(slots=True)
class AttentionMetadata:
    """The layout of the T tokens of a step: B sequences packed without padding, those with one token first.

        sequence 0   sequence 1        sequence 2
        [ t ]        [ t ]             [ t t t t t ]          T = 7, B = 3, num_decodes = 2
        query_start_loc = [0, 1, 2, 7]     seq_lens = [9, 4, 5]

    ``seq_lens`` includes the tokens of this step: the queries of a sequence are its last tokens.
    """

    positions: Tensor  # [T] int64, position of each token in its sequence
    slot_mapping: Tensor  # [T] int64, slot for its key and value; -1: not stored
    query_start_loc: Tensor  # [B + 1] int32
    seq_lens: Tensor  # [B] int32
    block_tables: Tensor  # [B, max_blocks] int32, the physical block of each logical block
    num_decodes: int  # number of leading rows with one query each
    max_query_len: int
    max_seq_len: int
    plan: dict[Any, Any] = field(default_factory=dict)  # what a backend computes once and shares among layers

    @classmethod
    def unpaged(cls, positions: Tensor, *, batch: int = 1, end: int | None = None) -> AttentionMetadata:
        """Equal rows for a cache without blocks: ``batch`` rows, of T / batch tokens each, at ``positions`` [T].

        ``end``: number of columns of a row, with those that the cache holds already; default: T / batch.
        """
        none, length = torch.empty(0, dtype=torch.int64), len(positions) // batch
        end = length if end is None else end
        return cls(
            positions=positions,
            slot_mapping=none,
            query_start_loc=torch.arange(0, len(positions) + 1, length, dtype=torch.int32),
            seq_lens=torch.full((batch,), end, dtype=torch.int32),
            block_tables=none,
            num_decodes=0,
            max_query_len=length,
            max_seq_len=end,
        )
