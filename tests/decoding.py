"""A decoder by itself, without an engine: the logits of a few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from paged_infer.cache.none import NoCache
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.model.decoder import Decoder

IDS = [5, 900, 17, 17, 2, 333, 64, 1002, 40, 8, 77, 3, 250, 251, 252, 6, 9, 12]


def logits(decoder: Decoder, token_ids: list[int]) -> Tensor:
    step = AttentionMetadata.unpaged(torch.arange(len(token_ids)))
    return decoder.logits(decoder(torch.tensor(token_ids), NoCache(decoder.kv_spec()), step))
