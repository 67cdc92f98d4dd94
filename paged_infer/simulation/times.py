"""When each token of each request came, and what follows from it.

    arrived      first token            last token
----|------------|-----|-----|-----|----|---------->  time
    |<-- TTFT -->|<--->|  inter-token latency (ITL), one for each further token
    |<------------- latency ----------->|             TPOT = (last - first) / (tokens - 1)
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True)
class TokenTimes:
    """One request: when it arrived and when its tokens came, in seconds on one clock.

    ``num_output`` is set where not every token's time is known: ``token_s`` then holds those of the first and the last.
    """

    arrived_s: float
    num_prompt: int
    token_s: list[float] = field(default_factory=list)
    num_output: int | None = None

    @property
    def num_tokens(self) -> int:
        """Output tokens."""
        return len(self.token_s) if self.num_output is None else self.num_output

    @property
    def ttft_s(self) -> float:
        """Time to first token, waiting in the queue included."""
        return self.token_s[0] - self.arrived_s

    @property
    def latency_s(self) -> float:
        """From arrival to the last token."""
        return self.token_s[-1] - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None where there is but one."""
        if self.num_tokens < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (self.num_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """From each token to the next; empty where not every token's time is known.

        The first may be longer: a batch may have to fill before it decodes.
        """
        if len(self.token_s) < self.num_tokens:
            return []
        return [later - earlier for earlier, later in pairwise(self.token_s)]


def quantile(ordered: ReadOnlyList[float], share: float) -> float:
    """The smallest of ``ordered`` that at least ``share`` of them do not exceed."""
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]
