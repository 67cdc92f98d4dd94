"""Whether two systems gave the same tokens and, where they did not, how near to a tie the choice was.

In float32 the tokens of a sequence do not depend on what else is in its batch (law 1). On a CPU this holds exactly. On
a GPU, cuBLAS chooses another kernel for another number of rows and adds in another order: the last bits of the logits
differ, and two that are nearly equal may change places. From there on the texts differ, so only the first
different token of a request is judged, by the margin between it and the expected one in the logits that the reference
computes for the tokens before.

``margin_bound`` is what rounding explains: a logit has passed about 7 sums a layer (q k v, scores, values, output,
gate and up, down, two norms), each of at most ``intermediate_size`` products. The errors of independent roundings,
2^-24 of a term each, grow as the square root of their number, and two logits take part:

    2 * sqrt(7 * layers * intermediate_size) * 2^-24 * the largest logit

Measured on a CPU against float64, the largest error of a logit is a tenth of that root or less, and a tie takes four
such errors (two logits, two runs). An error in a kernel, or products in TF32 (2^-11), exceeds it by far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paged_infer.bench.workloads import Workload
from paged_infer.cache.none import NoCache
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.fused.noise import noise, row_keys
from paged_infer.llm import LLM
from paged_infer.model.config import ModelConfig
from paged_infer.params import SamplingParams

MAX_DIFFERING = 2  # requests of a workload that near ties may change
MAX_MARGINS = 8  # requests whose margin is computed, each by a pass over the whole sequence

NextLogits = Callable[[list[int]], Tensor]  # all tokens so far -> logits [V] of the next


@dataclass(frozen=True, slots=True)
class TokenComparison:
    """One system's tokens compared with the reference's, request by request.

    ``margins``: at the first different token of each request that differs (of the first ``MAX_MARGINS``), how far the
    expected token is from the other one in the reference's logits; infinite where tokens are missing.
    """

    num_requests: int
    num_differing: int = 0
    margins: list[float] = field(default_factory=list)
    margin_bound: float = 0.0  # the largest margin that rounding explains
    allows_near_ties: bool = False  # on a GPU, in float32

    @property
    def is_same(self) -> bool:
        return not self.num_differing

    @property
    def is_right(self) -> bool:
        """The same tokens; where near ties are allowed, all but a few requests, and those by near ties."""
        few = self.num_differing <= MAX_DIFFERING
        return self.is_same or (self.allows_near_ties and few and max(self.margins) <= self.margin_bound)

    def line(self) -> str:
        """
        >>> TokenComparison(32, 1, [2e-05], 0.00036, allows_near_ties=True).line()
        '1 of 32 requests differs, by a margin of 2.0e-05 at its first different token: a near tie (bound 3.6e-04)'
        """
        if self.is_same:
            return f"the same tokens in all of {self.num_requests} requests"
        one = self.num_differing == 1
        differ = f"{self.num_differing} of {self.num_requests} requests {'differs' if one else 'differ'}"
        if not self.margins:  # not float32
            return differ
        found = ", ".join(f"{margin:.1e}" for margin in self.margins)
        verdict = "a near tie" if one else "near ties"
        if not self.is_right:
            too_much = f"more than near ties in {MAX_DIFFERING} requests"
            verdict = too_much if self.allows_near_ties else "an error on a CPU"
        place = f"at {'its' if one else 'their'} first different token"
        return f"{differ}, by a margin of {found} {place}: {verdict} (bound {self.margin_bound:.1e})"


def compare_tokens(
    llm: LLM,
    workload: Workload,
    expected: list[list[int]],
    runs: Iterable[list[list[int]]],
    next_logits: NextLogits | None = None,
) -> TokenComparison:
    """Compare ``runs``, each the token ids of every request of ``workload``, with the reference's; returns the worst.

    Args:
        llm: an engine with the reference's weights.
        next_logits: of the reference; None: ``llm``'s decoder, without a cache.
    """
    decoder = llm.engine.decoder
    is_float32 = decoder.dtype == torch.float32
    view = _View(workload, next_logits or decoder_logits(llm), decoder.config)
    allows = is_float32 and decoder.device.type == "cuda"
    compared = [_compare(expected, found, view if is_float32 else None, allows) for found in runs if found != expected]
    return max(compared, key=lambda one: (not one.is_right, one.num_differing), default=TokenComparison(len(expected)))


def decoder_logits(llm: LLM) -> NextLogits:
    """The logits of the engine's decoder for a whole sequence at once, without a cache."""
    decoder = llm.engine.decoder

    @torch.inference_mode()
    def next_logits(token_ids: list[int]) -> Tensor:
        step = AttentionMetadata.unpaged(torch.arange(len(token_ids), device=decoder.device))
        hidden = decoder(torch.tensor(token_ids, device=decoder.device), NoCache(decoder.kv_spec()), step)
        return decoder.logits(hidden[-1:])[0]

    return next_logits


def margin_bound(config: ModelConfig, largest_logit: float) -> float:
    """The module's docstring has the reasoning."""
    return 2 * math.sqrt(7 * config.num_layers * config.intermediate_size) * 2**-24 * largest_logit


@dataclass(frozen=True, slots=True)
class _View:
    """The logits of the reference for a request after some of its tokens."""

    workload: Workload
    next_logits: NextLogits
    config: ModelConfig

    def margin(self, index: int, before: list[int], expected: int, found: int) -> tuple[float, float]:
        """The margin between two tokens after ``before``, and its bound; infinite and 0 if they are not finite."""
        token_ids = self.workload.prompts[index] + before
        logits = self.next_logits(token_ids).float().cpu()
        scores = scores_of(logits, [expected, found], self.workload.params[index], len(token_ids))
        margin, bound = abs(scores[0] - scores[1]), margin_bound(self.config, float(logits.abs().max()))
        return (margin, bound) if math.isfinite(margin + bound) else (math.inf, 0.0)


def scores_of(logits: Tensor, token_ids: list[int], params: SamplingParams, position: int) -> list[float]:
    """What decides between tokens, in units of a logit [V]: the logit, and what the noise of a draw adds.

    NaN for a draw without a seed, whose noise is not known.
    """
    found = logits[token_ids]
    if params.temperature:
        if params.seed is None:
            return [math.nan] * len(token_ids)
        keys = row_keys([params.seed], [0], [position])
        found = found - params.temperature * noise(keys, torch.tensor(token_ids, dtype=torch.int32))[0].log()
    return [float(score) for score in found]


def _compare(
    expected: list[list[int]], found: list[list[int]], view: _View | None, allows_near_ties: bool
) -> TokenComparison:
    """``view`` None: without margins."""
    pairs = enumerate(zip(expected, found, strict=True))
    differing = [(index, ours, theirs) for index, (ours, theirs) in pairs if ours != theirs]
    margins, bounds = [], []
    for index, ours, theirs in differing[:MAX_MARGINS] if view is not None else ():
        place = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        assert view is not None
        margin, bound = (
            (math.inf, 0.0) if place is None else view.margin(index, ours[:place], ours[place], theirs[place])
        )
        margins.append(margin)
        bounds.append(bound)
    return TokenComparison(len(expected), len(differing), margins, min(bounds, default=0.0), allows_near_ties)
