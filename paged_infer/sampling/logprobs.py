"""Log-probabilities of sampled tokens, their ranks, and the most probable alternatives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paged_infer.control.step import SamplingRow
from paged_infer.outputs import Logprob, TokenLogprobs

_FLOAT32_MAX = torch.finfo(torch.float32).max


def logprobs_of(logits: Tensor, rows: Sequence[SamplingRow], token_ids: Sequence[int]) -> list[TokenLogprobs | None]:
    """Logprobs of the sampled tokens for rows that request them; None for the others and for rows without any.

    The token id of a failed row is -1; its entry, if not None, has no meaning.
    """
    logprobs: list[TokenLogprobs | None] = [None] * len(rows)
    asked = {i: row.params.logprobs for i, row in enumerate(rows) if row.params.logprobs is not None}
    if asked:
        places = list(asked)
        wanted = logits if len(places) == len(rows) else logits[places]
        found = token_logprobs(wanted, [max(0, token_ids[i]) for i in places], list(asked.values()))
        for i, of_row in zip(places, found, strict=True):
            logprobs[i] = of_row
    return logprobs


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs | None]:
    """Log-probabilities of given tokens and of the most probable ones, from the raw distribution.

    Processes slices of rows, so peak memory does not grow with R.

    Args:
        logits: [R, V], any float type; not modified.
        token_ids: R token ids within the vocabulary.
        num_top: for each row, how many of the most probable tokens to add; the whole vocabulary at most.

    Returns:
        For each row, token id -> ``Logprob`` in float32: the given token first, then the other top ones, best first
        (of equals the given token, then the lower id). That is ``num_top`` tokens, and one more where the given token
        is not among the top ones. ``rank`` is 1 plus the number of strictly more probable tokens; no text yet.
        None for a row with NaN or only -inf. +inf counts as float32's largest number.
    """
    results: list[TokenLogprobs | None] = []
    num_rows, vocab_size = logits.shape
    step = max(1, (1 << 22) // vocab_size)
    for start in range(0, num_rows, step):
        stop = start + step
        part = logits[start:stop].to(torch.float32)  # [r, V]
        peak = part.amax(dim=1, keepdim=True)
        if peak.isposinf().any():
            part, peak = part.clamp_max(_FLOAT32_MAX), peak.clamp_max(_FLOAT32_MAX)
        ids = torch.tensor(token_ids[start:stop], device=logits.device).unsqueeze(1)  # [r, 1]
        value = part.gather(1, ids)
        ranks: list[int] = (part > value).sum(dim=1).add_(1).tolist()
        num_columns = max(num_top[start:stop])
        if num_columns > 0:
            top_value, top_ids = largest(part, num_columns)
            value, ids = torch.cat((value, top_value), dim=1), torch.cat((ids, top_ids), dim=1)
        log_total = (part - peak).exp_().sum(dim=1, keepdim=True).log_()
        values: list[list[float]] = (value - peak - log_total).tolist()
        found = map(_by_token, values, ids.tolist(), ranks, num_top[start:stop])
        results += [
            of_row if is_sound else None
            for of_row, is_sound in zip(found, log_total.isfinite().flatten().tolist(), strict=True)
        ]
    return results


def _by_token(logprobs: list[float], ids: list[int], rank: int, num_top: int) -> TokenLogprobs:
    """The result for one row: ``logprobs`` and ``ids`` hold the given token, then the top ones in order."""
    found = {ids[0]: Logprob(logprobs[0], rank)}
    top_rank, previous = 1, math.inf
    num_top = min(num_top, len(ids) - 1)
    if rank <= num_top and ids[0] not in ids[1 : num_top + 1]:
        num_top -= 1  # it ties with the last of them and takes its place
    for place in range(1, num_top + 1):
        token_id, logprob = ids[place], logprobs[place]
        if logprob != previous:
            top_rank, previous = place, logprob
        found.setdefault(token_id, Logprob(logprob, top_rank))
    return found


def largest(values: Tensor, num_largest: int) -> tuple[Tensor, Tensor]:
    """The largest of each row, best first, of equals the lower index: [r, V] -> [r, K], int64 [r, K]."""
    vocab_size = values.shape[1]
    if num_largest >= vocab_size:
        return torch.sort(values, dim=1, descending=True, stable=True)
    top, ids = values.topk(num_largest, dim=1)
    is_new = top[:, 1:] != top[:, :-1]
    # topk returns equal values in any order, so sort the ids within each run of them. On a GPU a sort of so few costs
    # less than waiting to see whether there are any.
    if values.device.type != "cpu" or not is_new.all():
        runs = torch.nn.functional.pad(is_new.cumsum(dim=1), (1, 0))
        ids = (runs * vocab_size + ids).sort(dim=1).values % vocab_size
    return top, ids
