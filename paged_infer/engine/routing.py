"""Which of several replicas gets the next request: plain functions of the loads and of what was routed before.

    round_robin    the next one in turn, whatever the loads
    least_loaded   the fewest sequences, where a waiting one counts as four running ones: it delays the first token, and
                   one more running one hardly slows the others (vLLM: DPLBAsyncMPClient.get_core_engine_for_request)
    prefix         the replica that was sent the longest prefix of this prompt, and so may have its blocks (SGLang's
                   router: cache_aware). The least loaded one instead if the loads differ too much, so that a popular
                   prefix does not overload a replica, or if less than 30 % of the prompt's blocks were sent to any, so
                   that new prefixes spread

Prefixes are compared by the chain hashes that the engines' prefix caches use (``control.blocks.hashing``), salts
included. What a replica has is estimated from what it was sent: as many of the most recent blocks as its pool holds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as ReadOnlyList
from typing import NamedTuple

ROUND_ROBIN, LEAST_LOADED, PREFIX = ROUTINGS = ("round_robin", "least_loaded", "prefix")
WAITING_WEIGHT = 4
# Defaults of SGLang's router (cache_threshold, balance_abs_threshold, balance_rel_threshold).
MIN_MATCH = 0.3
MAX_DIFFERENCE, MAX_RATIO = 64, 1.5


class Load(NamedTuple):
    """Sequences of one replica; those on the way to it count as waiting."""

    waiting: int
    running: int


def score(load: Load) -> int:
    return WAITING_WEIGHT * load.waiting + load.running


def next_in_turn(replicas: ReadOnlyList[int], last: int) -> int:
    """The first of ``replicas``, in ascending order, after ``last``; or the first of all.

    >>> next_in_turn([0, 1, 3], last=1), next_in_turn([0, 1, 3], last=3)
    (3, 0)
    """
    return next((one for one in replicas if one > last), replicas[0])


def least_loaded(loads: Mapping[int, Load], last: int) -> int:
    """The replica of the lowest score; among equals, the next in turn after ``last``."""
    lowest = min(map(score, loads.values()))
    return next_in_turn([one for one, load in loads.items() if score(load) == lowest], last)


def is_balanced(loads: Mapping[int, Load]) -> bool:
    """Whether the loads are close enough to each other to route by prefixes."""
    totals = [load.waiting + load.running for load in loads.values()]
    most, fewest = max(totals), min(totals)
    return most - fewest <= MAX_DIFFERENCE or most <= MAX_RATIO * fewest


def longest_prefix(matches: Mapping[int, int], num_blocks: int, loads: Mapping[int, Load], last: int) -> int:
    """The replica that was sent the longest prefix; the least loaded one if that is short or the loads are unbalanced.

    Args:
        matches: how many of the prompt's ``num_blocks`` full blocks each replica has been sent.
    """
    longest = max(matches.values())
    if longest > MIN_MATCH * num_blocks and is_balanced(loads):
        loads = {one: load for one, load in loads.items() if matches[one] == longest}
    return least_loaded(loads, last)


class SentBlocks:
    """Hashes of the blocks that one replica was sent most recently: at most as many as its pool holds."""

    def __init__(self, max_num_blocks: int) -> None:
        self._max_num_blocks = max_num_blocks
        self._hashes: OrderedDict[bytes, None] = OrderedDict()  # the least recently sent first

    def num_matching(self, chain: ReadOnlyList[bytes]) -> int:
        """How many of the first hashes of ``chain`` were sent."""
        return next((i for i, one in enumerate(chain) if one not in self._hashes), len(chain))

    def add(self, chain: ReadOnlyList[bytes]) -> None:
        for one in reversed(chain):  # the end of a prompt is dropped before its beginning
            self._hashes[one] = None
            self._hashes.move_to_end(one)
        while len(self._hashes) > self._max_num_blocks:
            self._hashes.popitem(last=False)

    def clear(self) -> None:
        self._hashes.clear()


class Router:
    """Chooses a replica for each request, by one of ``ROUTINGS``. Not thread-safe."""

    def __init__(self, routing: str, num_replicas: int, num_blocks: int) -> None:
        self.routing = routing
        self._sent = [SentBlocks(num_blocks) for _ in range(num_replicas)]
        self._last = num_replicas - 1

    def choose(self, chain: ReadOnlyList[bytes], loads: Mapping[int, Load]) -> int:
        """A replica of ``loads`` for a prompt whose full blocks have the hashes ``chain``; see the module."""
        if self.routing == ROUND_ROBIN:
            chosen = next_in_turn(sorted(loads), self._last)
        elif self.routing == LEAST_LOADED:
            chosen = least_loaded(loads, self._last)
        else:
            matches = {one: self._sent[one].num_matching(chain) for one in loads}
            chosen = longest_prefix(matches, len(chain), loads, self._last)
            self._sent[chosen].add(chain)
        self._last = chosen
        return chosen

    def forget(self, replica: int) -> None:
        """The replica is restarted, with an empty cache."""
        self._sent[replica].clear()
