"""What the sampler computes, for one row, in the order of ``SamplingParams``: sort, cut, draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paged_infer.control.guided.vocabulary import allowed_ids
from paged_infer.control.step import SamplingRow
from paged_infer.kernels.fused.noise import noise, row_keys
from paged_infer.params import SamplingParams


def token_distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that a token is drawn from, up to its sum: logits [V] after the processors -> float32 [V]."""
    ordered, ids = logits.float().sort(descending=True, stable=True)  # of equals, the lower id first
    if params.is_greedy:
        probs = torch.eye(1, len(ids))[0]
    else:
        temperature = min(max(params.temperature, 1e-20), 1e20)
        probs = ((ordered - ordered[0]) / temperature).softmax(0)
        probs[probs < params.min_p * probs[0]] = 0.0
        if 0 < params.top_k < len(ids):
            probs[ordered < ordered[params.top_k - 1]] = 0.0  # tokens as probable as the k-th stay
        if params.top_p < 1.0:
            wide = probs.double()
            probs[wide.cumsum(0) - wide >= params.top_p * wide.sum()] = 0.0  # the token that crosses top_p stays
    return torch.zeros(len(ids)).scatter(0, ids, probs)


def sample_token(logits: Tensor, row: SamplingRow) -> int:
    """The token drawn from logits [V] after the processors; -1 where the row cannot be sampled."""
    bits = None if row.mask is None else row.mask.bits
    if bits is not None:
        allowed = set(allowed_ids(bits))
        logits = torch.tensor([x if i in allowed else -math.inf for i, x in enumerate(logits.tolist())])
    largest = float(logits.float().max())  # NaN if there is one
    if math.isnan(largest) or largest == -math.inf or (largest == math.inf and not row.params.is_greedy):
        return -1
    keys = row_keys([row.seed], [row.sample_index], [row.position])
    race = noise(keys, torch.arange(len(logits), dtype=torch.int32))[0]
    return int((token_distribution(logits, row.params) / race).argmax())
