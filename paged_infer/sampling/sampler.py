"""Logits to tokens: process, keep, draw. ``reference.py`` computes the same for one row in 40 readable lines.

::

    logits [R, V] --process--> logits_processors of the caller's own, then
                               logit_bias, min_tokens, penalties       (only rows that need it; on a copy)
                  --mask-----> -inf where a grammar forbids the token  (only rows with a grammar; on a copy)
                  --keep-----> temperature, min_p, top_k, top_p        (drops tokens, moves no noise)
                  --draw-----> argmax(p / E), E exponential noise      (greedy rows: argmax of the logits)

Rows are independent: a row's token is a function of its own logits and its own ``SamplingRow``, whatever rows it is
batched with. Rows of one kind are sampled together, each kind in the cheapest way that is exact:

- greedy rows take one argmax;
- rows without top_k and top_p draw from the whole vocabulary: no sort;
- rows with top_k find the K most probable tokens (K a little above their k) and draw from those;
- rows with top_p alone do the same with the K most probable tokens, which nearly always hold the nucleus.

If K was too few (many tokens share the k-th place, or the distribution is flat), the row is drawn again from eight
times as many, up to the whole vocabulary. Noise belongs to a token, so none of this changes what is drawn.

**Where a new sampling rule goes.** A rule that compares a token's probability with the largest one goes next to min_p:
first into ``reference.py``, which tests hold every path to, then into ``_probs``, and rows that use it must not reach
the kernel (``_path``). A rule that needs the whole row (a sum, a deviation: epsilon, top_n_sigma, typical_p)
goes with the logits processors, which the reference starts after: ``_probs`` sees only the K candidates of a row with
top_k, so there the rule would compute its statistics from them and keep the wrong tokens, silently. Either way
``is_kernel_enough`` must be False for such rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from paged_infer.control.step import SamplingRow
from paged_infer.kernels.device import to_device
from paged_infer.kernels.fused.noise import noise, row_keys
from paged_infer.kernels.fused.sample import argmax_reference, mask_logits_reference
from paged_infer.outputs import TokenLogprobs
from paged_infer.params import SamplingParams
from paged_infer.sampling.logits_processors import apply_logits_processors
from paged_infer.sampling.logprobs import largest, logprobs_of
from paged_infer.sampling.own_processors import apply_own_processors

# A temperature is clamped to these, so that float32 neither rounds it to 0 nor divides -inf by inf. For
# logits of any use, one beyond gives the same distribution as the limit.
SMALLEST, LARGEST = 1e-20, 1e20
_FLOAT32_MAX = torch.finfo(torch.float32).max
CANNOT_SAMPLE = "its logits cannot be sampled: they contain NaN or +inf, or only -inf"

_Drawn = tuple[Tensor, Tensor]  # tokens int64 [r], scores [r]
# (logits [r, V], their r rows, num_candidates) -> the winners. A winner's score is not finite where the row cannot be
# drawn from: NaN wins every maximum, and softmax gives NaN for a row with +inf or only -inf. A greedy row may hold
# +inf: the first +inf is the most probable token, as in transformers.
_Draw = Callable[[Tensor, Sequence[SamplingRow], int], _Drawn]
# (logits [r, V], temperatures, seeds, sample indices, positions, [r] each, masks [r, words] or None)
Kernel = Callable[..., _Drawn]
Argmax = Callable[[Tensor], tuple[Tensor, Tensor]]  # ``kernels.fused.sample.argmax_reference``
MaskLogits = Callable[[Tensor, Tensor], Tensor]  # ``kernels.fused.sample.mask_logits_reference``


@dataclass(slots=True)
class SampledTokens:
    """One token per row; -1 for a row that cannot be sampled, which does not affect the other rows.

    ``logprobs`` is None where the row's ``params.logprobs`` is None, and for a row whose logprobs are undefined.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


@dataclass(slots=True)
class AsyncTokens:
    """Tokens that the device may still be sampling, and their copy on the way to the host."""

    tokens: Tensor  # [R] int64, on the device, input of the next step
    host: Tensor  # [R] int64, once ``ready``; -1 where a row cannot be sampled
    ready: torch.cuda.Event | None  # None: ``host`` is complete
    errors: Mapping[int, str] = field(default_factory=dict)  # row -> why its request's logits processors failed

    def token_ids(self) -> list[int]:
        """Wait for the tokens and return them; -1 for a row that cannot be sampled (``CANNOT_SAMPLE``)."""
        if self.ready is not None:
            self.ready.synchronize()
        token_ids: list[int] = self.host.tolist()
        return token_ids


class Sampler:
    """Samples one token for every row. It has no state: the same rows give the same tokens.

    Args:
        kernel: ``kernels.sample``, to sample rows without top_k, top_p and min_p in two launches; None for torch.
        argmax: how greedy rows are sampled if ``kernel`` is None.
        mask_logits: how the tokens that a grammar forbids are masked, for rows that the kernel does not sample.
    """

    def __init__(
        self,
        kernel: Kernel | None = None,
        argmax: Argmax = argmax_reference,
        mask_logits: MaskLogits = mask_logits_reference,
    ) -> None:
        self._kernel = kernel
        self._argmax = argmax
        self._mask_logits = mask_logits

    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow]) -> SampledTokens:
        """Sample a token from each row of ``logits``.

        Args:
            logits: [R, V], any float type, any device; not modified.
            rows: how to sample each of the R rows. Token ids in them are within the vocabulary.

        Raises:
            ValueError: R is not ``len(rows)``.
        """
        if not rows:
            return SampledTokens([], [])
        token_ids = self.sample(logits, rows).token_ids()
        return SampledTokens(token_ids, logprobs_of(logits, rows, token_ids))

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> AsyncTokens:
        """Sample a token for each row, at least one; see ``__call__``.

        With rows that have top_k or top_p, the host waits once for a GPU (``_draw_again``); otherwise it does not.
        """
        num_rows, vocab_size = logits.shape
        if num_rows != len(rows):
            raise ValueError(f"{len(rows)} rows to sample from logits of shape {tuple(logits.shape)}")
        own, errors = apply_own_processors(logits, rows)
        edited = apply_logits_processors(own, rows)
        paths: dict[tuple[_Draw, int, bool], list[int]] = {}
        for i, row in enumerate(rows):
            draw, num_candidates = self._path(row.params, vocab_size)
            is_masked = row.is_masked and draw != self._draw_by_kernel  # which masks its rows itself
            paths.setdefault((draw, num_candidates, is_masked), []).append(i)

        if len(paths) == 1:
            ((draw, num_candidates, is_masked),) = paths
            if is_masked:
                edited = self._mask_logits(edited, masks_of(rows, edited))
            tokens, scores = _in_slices(draw, edited, rows, num_candidates)
            return copy_to_host(tokens, torch.where(scores.isfinite(), tokens, -1), errors)
        tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
        scores = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
        for (draw, num_candidates, is_masked), members in paths.items():
            index = to_device(torch.tensor(members), logits.device)
            asking, own = [rows[i] for i in members], edited[index]
            if is_masked:
                own = self._mask_logits(own, masks_of(asking, own))
            tokens[index], scores[index] = _in_slices(draw, own, asking, num_candidates)
        return copy_to_host(tokens, torch.where(scores.isfinite(), tokens, -1), errors)

    def is_kernel_enough(self, rows: Sequence[SamplingRow], vocab_size: int) -> bool:
        """Whether the kernel alone, on the unchanged logits, draws what ``sample`` would draw for all of these rows."""
        kinds = {id(row.params): row.params for row in rows}  # samples of a request share theirs
        for params in kinds.values():
            is_simple = self._path(params, vocab_size)[0] == self._draw_by_kernel
            if not is_simple or params.logit_bias or params.needs_history:
                return False
        return not any(row.is_masked or row.num_output_tokens < row.params.min_tokens for row in rows)

    def _path(self, params: SamplingParams, vocab_size: int) -> tuple[_Draw, int]:
        """The cheapest exact path for a row, and the number of candidates to start with; the row alone decides."""
        is_greedy, has_top_k = params.temperature == 0, 0 < params.top_k < vocab_size
        is_cut = (has_top_k or params.top_p < 1.0) and not is_greedy
        if self._kernel is not None and params.min_p == 0.0 and not is_cut:
            return self._draw_by_kernel, 1
        if is_greedy:
            return self._draw_greedy, 1
        if has_top_k:
            return _draw_top_k, (1 << params.top_k.bit_length()) + 32  # powers of two: few paths; 32 more for ties
        return (_draw_top_p, max(128, vocab_size // 128)) if is_cut else (_draw_from_all, vocab_size)

    def _draw_greedy(self, logits: Tensor, rows: Sequence[SamplingRow], num_candidates: int) -> _Drawn:
        """The most probable token; of equals, the lower id."""
        scores, tokens = self._argmax(logits)
        return tokens, scores.float().clamp_max(_FLOAT32_MAX)

    def _draw_by_kernel(self, logits: Tensor, rows: Sequence[SamplingRow], num_candidates: int) -> _Drawn:
        assert self._kernel is not None
        num = len(rows)
        # One array, so one copy to the device; an even number of columns, so that all of them begin at 16 bytes, as the
        # kernel was compiled for.
        columns = np.empty((4, num + num % 2), np.int64)
        columns[0].view(np.float32)[:num] = [min(row.params.temperature, LARGEST) for row in rows]
        columns[1, :num] = [row.seed for row in rows]
        columns[2, :num] = [row.sample_index for row in rows]
        columns[3, :num] = [row.position for row in rows]
        on_device = to_device(torch.from_numpy(columns), logits.device)
        masks = masks_of(rows, logits) if any(row.is_masked for row in rows) else None
        return self._kernel(logits, on_device[0].view(torch.float32)[:num], *on_device[1:, :num], masks)


def masks_of(rows: Sequence[SamplingRow], logits: Tensor) -> Tensor:
    """The rows' masks as int32 [R, ceil(V / 32)], on the device of ``logits`` [R, V]; all ones where none is."""
    num_bytes = -(-logits.shape[1] // 32) * 4
    bits = (None if row.mask is None else row.mask.bits for row in rows)
    masks = [b"\xff" * num_bytes if of_row is None else of_row or bytes(num_bytes) for of_row in bits]
    words = np.frombuffer(bytearray().join(masks), np.int32).reshape(len(rows), -1)
    return to_device(torch.from_numpy(words), logits.device)


def copy_to_host(tokens: Tensor, valid: Tensor, errors: Mapping[int, str] | None = None) -> AsyncTokens:
    """Start the copy to the host of ``valid``: ``tokens`` [R] with -1 where a row cannot be sampled."""
    host = torch.empty(len(valid), dtype=valid.dtype, pin_memory=valid.is_cuda)
    host.copy_(valid, non_blocking=True)
    if not valid.is_cuda:
        return AsyncTokens(tokens, host, None, errors or {})
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(valid.device))
    return AsyncTokens(tokens, host, ready, errors or {})


# ---------------------------------------------------------------------------------------- keep and race


def _in_slices(draw: _Draw, logits: Tensor, rows: Sequence[SamplingRow], num_candidates: int) -> _Drawn:
    """Draw a few rows at a time, so that their candidates fit in a CPU's caches, or a small part of a GPU's memory."""
    max_elements = torch.get_num_threads() << 16 if logits.device.type == "cpu" else 1 << 26
    step = max(1, max_elements // num_candidates)
    if step >= len(rows):
        return draw(logits, rows, num_candidates)
    starts = range(0, len(rows), step)
    drawn = [draw(logits[i : i + step], rows[i : i + step], num_candidates) for i in starts]
    return torch.cat([tokens for tokens, _ in drawn]), torch.cat([scores for _, scores in drawn])


def _draw_from_all(logits: Tensor, rows: Sequence[SamplingRow], num_candidates: int) -> _Drawn:
    """Neither top_k nor top_p: every token takes part."""
    probs = _probs(logits, rows)  # [r, V]
    return _race(probs, torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device), rows)


def _draw_top_k(logits: Tensor, rows: Sequence[SamplingRow], num_candidates: int) -> _Drawn:
    """top_k, then top_p of what it keeps. All tokens as probable as the k-th stay, as in vLLM."""
    values, ids = largest(logits, num_candidates)  # [r, K] each
    kth = values.gather(1, _column([row.params.top_k - 1 for row in rows], torch.int64, logits.device))
    probs = _probs(values.masked_fill(values < kth, -math.inf), rows)
    drawn = _race(_nucleus(probs, rows, probs), ids, rows)
    if num_candidates >= logits.shape[1]:
        return drawn
    # Is the k-th place shared with tokens beyond the candidates?
    cut_off = (values[:, -1:] == kth) & (kth > -math.inf)  # [r, 1]
    return _draw_again(_draw_top_k, cut_off, drawn, logits, rows, num_candidates)


def _draw_top_p(logits: Tensor, rows: Sequence[SamplingRow], num_candidates: int) -> _Drawn:
    """top_p alone: the nucleus is a prefix of the candidates if it ends among them."""
    probs = _probs(logits, rows)  # [r, V]
    candidates, ids = largest(probs, num_candidates)  # [r, K] each
    nucleus = _nucleus(candidates, rows, probs)
    drawn = _race(nucleus, ids, rows)
    if num_candidates >= logits.shape[1]:
        return drawn
    # Does the nucleus contain the last candidate, or a token as probable?
    cut_off = ((nucleus == candidates[:, -1:]) & (nucleus > 0.0)).any(dim=1)  # [r]
    return _draw_again(_draw_top_p, cut_off, drawn, logits, rows, num_candidates)


def _draw_again(
    draw: _Draw, cut_off: Tensor, drawn: _Drawn, logits: Tensor, rows: Sequence[SamplingRow], num_candidates: int
) -> _Drawn:
    """Draw the rows that had too few candidates (bool ``cut_off`` of r) again, from eight times as many.

    The host has to wait to see which rows those are. That costs less than sorting the whole vocabulary in each step,
    which would need no wait.
    """
    index = cut_off.flatten().nonzero().flatten()
    if len(index) > 0:
        tokens, scores = drawn
        rows = [rows[i] for i in index.tolist()]
        tokens[index], scores[index] = _in_slices(draw, logits[index], rows, num_candidates * 8)
    return drawn


def _probs(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Probabilities at each row's temperature, 0 where min_p drops the token: [r, K] -> float32 [r, K].

    The largest logit is subtracted before the division, so finite logits do not overflow at any temperature.
    """
    temperatures = [min(max(row.params.temperature, SMALLEST), LARGEST) for row in rows]
    wide = logits.float()
    scaled = (wide - wide.amax(dim=1, keepdim=True)).div_(_column(temperatures, torch.float32, logits.device))
    probs = torch.softmax(scaled, dim=1)
    if any(row.params.min_p > 0.0 for row in rows):
        min_p = _column([row.params.min_p for row in rows], torch.float32, logits.device)
        probs.masked_fill_(probs < min_p * probs.amax(dim=1, keepdim=True), 0.0)
    return probs


def _nucleus(candidates: Tensor, rows: Sequence[SamplingRow], probs: Tensor) -> Tensor:
    """top_p (Holtzman et al. 2020, "The curious case of neural text degeneration"): 0 outside the nucleus.

    A token stays while those before it hold less than top_p, so the one that crosses the boundary stays. Sums
    are in float64: the boundary does not depend on the order in which a device adds.

    Args:
        candidates: float32 [r, K], best first.
        rows: the r rows.
        probs: float32 [r, V]; top_p is a share of its sum.
    """
    if all(row.params.top_p >= 1.0 for row in rows):
        return candidates
    shares = [row.params.top_p if row.params.top_p < 1.0 else math.inf for row in rows]
    limit = _column(shares, torch.float64, probs.device) * probs.sum(dim=1, keepdim=True, dtype=torch.float64)
    wide = candidates.double()
    before = wide.cumsum(dim=1) - wide
    return candidates.masked_fill(before >= limit, 0.0)


def _race(probs: Tensor, ids: Tensor, rows: Sequence[SamplingRow]) -> _Drawn:
    """Draw one token per row, in proportion to ``probs`` [r, K] of the tokens ``ids`` [K] or [r, K]."""
    keys = row_keys([r.seed for r in rows], [r.sample_index for r in rows], [r.position for r in rows])
    scores, winners = (probs / noise(to_device(keys, probs.device), ids.to(torch.int32))).max(dim=1)
    return (winners if ids.dim() == 1 else ids.gather(1, winners.unsqueeze(1)).squeeze(1)), scores


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    return to_device(torch.tensor(values, dtype=dtype), device).unsqueeze(1)  # [r, 1]
