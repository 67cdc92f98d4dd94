"""The most probable next tokens of beams: logits to (token id, logprob), as transformers' beam search scores them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paged_infer.control.step import Candidates, TopKRow


def beam_candidates(logits: Tensor, rows: Sequence[TopKRow]) -> list[Candidates | None]:
    """For each row its ``num_top`` most probable tokens, best first; None for a row with NaN, +inf or only -inf.

    Logprobs are of the raw distribution in float32: a banned token is left out without renormalising the others.
    Processes slices of rows, so peak memory does not grow with R.

    Args:
        logits: [R, V], any float type; not modified.
        rows: the request of each of the R rows; at most V tokens.
    """
    found: list[Candidates | None] = []
    step = max(1, (1 << 22) // logits.shape[1])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        logprobs = torch.log_softmax(logits[start : start + step], dim=1, dtype=torch.float32)  # [r, V]
        for place, row in enumerate(part):
            if row.banned_token_ids:
                logprobs[place, list(row.banned_token_ids)] = -math.inf
        values, ids = logprobs.topk(max(row.num_top for row in part), dim=1)  # [r, K] each
        each = zip(part, ids.tolist(), values.tolist(), strict=True)  # each waits once for the device
        found += [
            list(zip(i[: row.num_top], v[: row.num_top], strict=True)) if math.isfinite(v[0]) else None
            for row, i, v in each
        ]
    return found
