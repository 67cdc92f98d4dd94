"""Lengths of prompts and outputs: seeded stand-ins for the data sets that the PagedAttention paper serves.

The paper (Kwon et al., SOSP 2023, Figure 11) prints the means, and plots the densities:

                 mean prompt   mean output
    ShareGPT        161.31        337.99      conversations: short prompts, long answers, a heavy tail
    Alpaca           19.31         58.45      instructions: all short

Here each length is log-normal, and lengths above half the context of 2,048 are dropped (the paper's benchmark also
drops what does not fit). The means are calibrated to the paper's. The spreads (sigma) are ours, chosen so that the
densities peak about as high as the plotted ones. A data set's name here means its stand-in, never its texts.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

MAX_MODEL_LEN = 2048  # OPT-13B's context, the paper's server
_NORMAL = NormalDist()


@dataclass(frozen=True)
class ShortLogNormal:
    """A log-normal length truncated at ``longest``, with its median chosen to give this mean."""

    mean: float
    sigma: float
    longest: int = MAX_MODEL_LEN // 2

    @cached_property
    def mu(self) -> float:
        """Mean of the logarithm before truncation, found by bisection: the mean length rises with it."""
        low, high = -5.0, 2 * math.log(self.longest)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean_at(middle) < self.mean else (low, middle)
        return low

    def _mean_at(self, mu: float) -> float:
        cut = (math.log(self.longest) - mu) / self.sigma
        return math.exp(mu + self.sigma**2 / 2) * _NORMAL.cdf(cut - self.sigma) / _NORMAL.cdf(cut)

    def draw(self, rng: random.Random) -> int:
        while (length := rng.lognormvariate(self.mu, self.sigma)) > self.longest:
            pass
        return max(1, round(length))


@dataclass(frozen=True, slots=True)
class RequestLengths:
    """Tokens of one request: its prompt, and the output of each of its samples (as in the paper, all of one length)."""

    num_prompt: int
    num_output: int
    num_samples: int = 1

    @property
    def num_stored(self) -> int:
        """Slots that a sample fills by its end: the last token is sampled but never stored."""
        return self.num_prompt + self.num_output - 1


@dataclass(frozen=True, slots=True)
class Dataset:
    name: str
    prompt: ShortLogNormal
    output: ShortLogNormal

    def draw(self, num_output_tokens: int, seed: int, num_samples: int = 1) -> list[RequestLengths]:
        """Requests with about ``num_output_tokens`` in all, of one sample each; the same ones for the same seed."""
        rng = random.Random(f"{self.name} {seed}")
        num_requests = max(1, round(num_output_tokens / self.output.mean))
        return [RequestLengths(self.prompt.draw(rng), self.output.draw(rng), num_samples) for _ in range(num_requests)]


SHAREGPT = Dataset("ShareGPT-like", ShortLogNormal(161.31, 1.4), ShortLogNormal(337.99, 1.0))
ALPACA = Dataset("Alpaca-like", ShortLogNormal(19.31, 0.5), ShortLogNormal(58.45, 0.9))
