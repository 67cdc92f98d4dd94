"""When each token of each request came, and what follows from that: the one set of metrics of every bench.

    arrived      first token            last token
----|------------|-----|-----|-----|----|---------->  time
    |<-- TTFT -->|<--->|  inter-token latency (ITL), one for each further token
    |<------------- latency ----------->|             TPOT = (last - first) / (tokens - 1)
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, field
from itertools import pairwise

from paged_infer.control.usage import KVUsage


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

        The first is the odd one: a batch may have to fill before it decodes.
        """
        if len(self.token_s) < self.num_tokens:
            return []
        return [later - earlier for earlier, later in pairwise(self.token_s)]


@dataclass(slots=True)
class Run:
    """One contender on one workload: what it said, when, and what its cache held meanwhile.

    ``seconds`` is from the first request's arrival to the last one's end, on the wall. ``usage`` is None where a peer
    does not tell.
    """

    token_ids: list[list[int]]
    times: list[TokenTimes]
    seconds: float
    usage: KVUsage | None = None
    kv_bytes_per_token: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids in self.token_ids)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second."""
        return self.num_tokens / self.seconds

    @property
    def peak_kv_bytes(self) -> int | None:
        return None if self.usage is None else self.usage.peak_slots * self.kv_bytes_per_token

    @property
    def kv_fill(self) -> float | None:
        """Share of KV bytes in use that hold tokens, over all steps; None where no KV is kept, or a peer is silent."""
        return self.usage.fill if self.usage is not None and self.usage.slot_steps else None


def quantile(ordered: ReadOnlyList[float], share: float) -> float:
    """The smallest of ``ordered`` that at least ``share`` of them do not exceed."""
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]
