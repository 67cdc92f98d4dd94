"""The description of one step: which tokens it computes, and where their keys and values are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """Where the T tokens of a step belong: B sequences packed without padding, those with one token first.

        sequence 0   sequence 1        sequence 2
        [ t ]        [ t ]             [ t t t t t ]          T = 7, B = 3, num_decodes = 2
        query_start_loc = [0, 1, 2, 7]     seq_lens = [9, 4, 5]

    ``seq_lens`` counts a sequence's tokens up to and including this step's, so its queries are the last ones of them.
    """

    positions: Tensor  # [T] int64, place of each token in its own sequence
    slot_mapping: Tensor  # [T] int64, where its key and value go; -1 nowhere
    query_start_loc: Tensor  # [B + 1] int32
    seq_lens: Tensor  # [B] int32
    block_tables: Tensor  # [B, max_blocks] int32, physical block of each logical block
    num_decodes: int  # the first rows, one query each
    max_query_len: int
    max_seq_len: int
    plan: dict[Any, Any] = field(default_factory=dict)  # what a backend worked out once for all layers of this step
