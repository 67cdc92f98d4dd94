"""Changes to a row's logits before sampling: logit_bias, the min_tokens mask, penalties.

Only rows that need them are changed, on a copy, and only at the tokens concerned: a batch without them costs nothing,
and no penalty loops over the vocabulary. A sampling rule that needs the whole row belongs here; see ``sampler.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paged_infer.control.step import SamplingRow
from paged_infer.kernels.device import to_device

# A repetition penalty is clamped to these, so that float32 neither rounds it to 0 nor to inf.
SMALLEST, LARGEST = 1e-20, 1e20


def apply_logits_processors(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Apply logit_bias, then the min_tokens mask, then penalties.

    Args:
        logits: [R, V], any float type, any device; not modified.
        rows: the parameters of each of the R rows. Token ids in them are within the vocabulary.

    Returns:
        [R, V], in float32 at least; ``logits`` itself if no row changes anything.
    """
    vocab_size = logits.shape[1]
    biased: list[int] = []  # places in the flattened [R * V] logits
    biases: list[float] = []
    masked: list[int] = []
    penalised: list[int] = []
    for i, row in enumerate(rows):
        params = row.params
        if params.logit_bias:
            biased += [i * vocab_size + token_id for token_id in params.logit_bias]
            biases += params.logit_bias.values()
        if row.num_output_tokens < params.min_tokens:
            masked += [i * vocab_size + token_id for token_id in row.end_token_ids]
        if params.has_penalties:
            penalised.append(i)
    if not (biased or masked or penalised):
        return logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    edited = logits.to(wide, copy=True, memory_format=torch.contiguous_format)
    flat = edited.view(-1)
    if biased:
        flat[to_device(torch.tensor(biased), flat.device)] += to_device(torch.tensor(biases, dtype=wide), flat.device)
    if masked:
        flat[to_device(torch.tensor(masked), flat.device)] = -math.inf
    if penalised:
        apply_penalties(flat, rows, penalised, vocab_size)
    return edited


def apply_penalties(flat: Tensor, rows: Sequence[SamplingRow], penalised: list[int], vocab_size: int) -> None:
    """Apply the three penalties in place to the tokens that have occurred.

    Repetition (Keskar et al. 2019, "CTRL", 4.1, with negative logits multiplied so that they fall too) counts
    prompt and output; presence and frequency count the output alone.

    Args:
        flat: float [R * V], the logits of all rows, one after the other.
        rows: all R rows.
        penalised: indices of the rows to change.
        vocab_size: V.
    """
    params = [rows[i].params for i in penalised]
    outputs = [rows[i].output_token_ids for i in penalised]
    offsets = np.array(penalised, dtype=np.int64) * vocab_size

    def on_device(values: NDArray[Any]) -> Tensor:
        return to_device(torch.from_numpy(values), flat.device)

    repetition = np.clip([p.repetition_penalty for p in params], SMALLEST, LARGEST)
    if (repetition != 1.0).any():
        prompts = [rows[i].prompt_token_ids for i in penalised]
        owners, ids, _ = _distinct(outputs + prompts, len(params), vocab_size)
        places, penalty = on_device(offsets[owners] + ids), on_device(repetition[owners]).to(flat.dtype)
        value = flat[places]
        # Finite logits stay finite, whatever the penalty; masked ones (-inf) stay masked.
        limits = torch.finfo(flat.dtype)
        changed = torch.where(value > 0, value / penalty, value * penalty).clamp_(limits.min, limits.max)
        flat[places] = torch.where(value.isfinite(), changed, value)

    presence, frequency = np.array([(p.presence_penalty, p.frequency_penalty) for p in params]).T
    if presence.any() or frequency.any():
        owners, ids, counts = _distinct(outputs, len(params), vocab_size)
        penalty = on_device(presence[owners] + frequency[owners] * counts).to(flat.dtype)
        flat[on_device(offsets[owners] + ids)] -= penalty


def _distinct(sequences: list[Sequence[int]], num_owners: int, vocab_size: int) -> tuple[NDArray[Any], ...]:
    """The distinct tokens of each owner; sequence i belongs to owner i % num_owners. By sorting, on the host.

    Returns:
        Three int64 arrays: owner, token id, count.
    """
    ids = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in sequences])
    owners = np.repeat(np.arange(len(sequences)) % num_owners, [len(sequence) for sequence in sequences])
    places, counts = np.unique(owners * vocab_size + ids, return_counts=True)
    return places // vocab_size, places % vocab_size, counts
