"""The metadata of one step that attention needs: which tokens it computes, and where their keys and values are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


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
