"""When each token of each request came, and the latencies that follow.

    arrived      first token            last token
----|------------|-----|-----|-----|----|---------->  time
    |<-- TTFT -->|<--->|  inter-token latency (ITL), one for each further token
    |<------------- latency ----------->|             TPOT = (last - first) / (tokens - 1)

In an answer with reasoning, the first tokens are not what its user waits for:

    arrived      first token       reasoning ends     first content token   last token
----|------------|-----|-----|-----|------------------|-----|-----|---------|---------->  time
    |<-- TTFT -->|                 |                  |
    |<------ reasoning_s --------->|                  |
    |<---------------- TTFC ------------------------->|
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True)
class TokenTimes:
    """One request: when it arrived and when its tokens came, in seconds on one clock.

    ``num_output`` is set if not every token's time is known: ``token_s`` then holds those of the first and the last.
    ``reasoned_s`` and ``content_s``: when its reasoning ended, and when its first content token came; None: never, or
    unknown.
    """

    arrived_s: float
    num_prompt: int
    token_s: list[float] = field(default_factory=list)
    num_output: int | None = None
    reasoned_s: float | None = None
    content_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """Output tokens."""
        return len(self.token_s) if self.num_output is None else self.num_output

    @property
    def ttft_s(self) -> float:
        """Time to first token, including the time in the queue."""
        return self.token_s[0] - self.arrived_s

    @property
    def reasoning_s(self) -> float | None:
        """From arrival to the end of the reasoning."""
        return None if self.reasoned_s is None else self.reasoned_s - self.arrived_s

    @property
    def ttfc_s(self) -> float | None:
        """Time to first content token."""
        return None if self.content_s is None else self.content_s - self.arrived_s

    @property
    def latency_s(self) -> float:
        """From arrival to the last token."""
        return self.token_s[-1] - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None if there is only one."""
        if self.num_tokens < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (self.num_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """From each token to the next; empty if not every token's time is known.

        The first may be longer: a batch may have to fill before it decodes.
        """
        if len(self.token_s) < self.num_tokens:
            return []
        return [later - earlier for earlier, later in pairwise(self.token_s)]


def without_reasoning(times: TokenTimes) -> TokenTimes:
    """The same answer as measured by a client that gets the content and the number of all tokens, but no reasoning.

    OpenAI's API is such a server: ``usage.completion_tokens`` counts reasoning. The client's first token is the first
    content token, so its TTFT is worse than the engine's. It divides the time of the content by the number of all
    tokens, so its TPOT is better. The latency is the same. Nothing ran faster or slower: compare TTFC with TTFC.

    Raises:
        ValueError: there is no content.
    """
    if times.content_s is None:
        raise ValueError("no content has come: a client that is sent no reasoning has no first token")
    return TokenTimes(times.arrived_s, times.num_prompt, [times.content_s, times.token_s[-1]], times.num_tokens)


def quantile(ordered: ReadOnlyList[float], share: float) -> float:
    """The smallest of ``ordered`` that at least ``share`` of them do not exceed."""
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]
