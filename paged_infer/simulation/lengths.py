"""How long prompts and outputs are: seeded stand-ins for the data sets that the PagedAttention paper serves.

The paper (Kwon et al., SOSP 2023, Figure 11) prints the means, and draws the rest:

                 mean prompt   mean output
    ShareGPT        161.31        337.99      conversations: short beginnings, long answers, a heavy tail
    Alpaca           19.31         58.45      instructions: all short

Here each length is log-normal, and what exceeds half the context of 2,048 is dropped (the paper's benchmark drops what
does not fit, too). The means are the paper's, by calibration; the spreads (sigma) are ours, chosen so that densities
peak about as high as the drawn ones. A data set's name here means its stand-in, never the texts themselves.
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
    """A log-normal length, given that it is at most ``longest``, with the median placed so that it has this mean."""

    mean: float
    sigma: float
    longest: int = MAX_MODEL_LEN // 2

    @cached_property
    def mu(self) -> float:
        """Mean of the uncut logarithm, found by bisection: the mean rises with it."""
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
        """Slots that a sample fills in its life: the last token is drawn and never stored."""
        return self.num_prompt + self.num_output - 1


@dataclass(frozen=True, slots=True)
class Dataset:
    name: str
    prompt: ShortLogNormal
    output: ShortLogNormal

    def draw(self, num_output_tokens: int, seed: int, num_samples: int = 1) -> list[RequestLengths]:
        """As many requests as have about ``num_output_tokens``, of one sample each; the same ones for the same seed."""
        rng = random.Random(f"{self.name} {seed}")
        num_requests = max(1, round(num_output_tokens / self.output.mean))
        return [RequestLengths(self.prompt.draw(rng), self.output.draw(rng), num_samples) for _ in range(num_requests)]


SHAREGPT = Dataset("ShareGPT-like", ShortLogNormal(161.31, 1.4), ShortLogNormal(337.99, 1.0))
ALPACA = Dataset("Alpaca-like", ShortLogNormal(19.31, 0.5), ShortLogNormal(58.45, 0.9))
