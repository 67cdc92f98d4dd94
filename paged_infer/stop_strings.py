"""Where growing text first holds a stop string, at a cost that does not depend on how many stop strings there are.

All stop strings are one tree, and a text walks through it, each character once (Aho and Corasick 1975). The node that
it has come to is its longest end that begins a stop string:

    stops "hers", "she"       h - e - r - s*             text   u   s   h     e*     r
                              s - h - e*                 node   .   s   sh    she    her, by the link from she to he
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache


class StopTree:
    """Stop strings as a tree of nodes, of which 0 is the root. The lists have an entry a node."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.links = [0]  # to the node of the longest shorter end that begins a stop string
        self.stops = [""]  # the longest stop string that ends here, if any
        self.num_open = [0]  # length of the longest end that may still become a stop string
        depths = [0]
        for stop in stops:
            node = 0
            for char in stop:
                if char not in self.children[node]:
                    self.children[node][char] = len(depths)
                    depths.append(depths[node] + 1)
                    self.children.append({})
                    self.links.append(0)
                    self.stops.append("")
                    self.num_open.append(0)
                node = self.children[node][char]
            self.stops[node] = stop
        queue = deque([0])  # the shallower ones first: links lead to them
        while queue:
            node = queue.popleft()
            self.num_open[node] = depths[node] if self.children[node] else self.num_open[self.links[node]]
            for char, child in self.children[node].items():
                self.links[child] = self.next(self.links[node], char) if node else 0
                self.stops[child] = self.stops[child] or self.stops[self.links[child]]
                queue.append(child)

    def next(self, node: int, char: str) -> int:
        """Where a text at ``node`` comes to with one more character."""
        while node and char not in self.children[node]:
            node = self.links[node]
        return self.children[node].get(char, 0)


@lru_cache(maxsize=8)
def stop_tree(stops: tuple[str, ...]) -> StopTree:
    """The same for all samples of a request."""
    return StopTree(stops)


class StopFinder:
    """Reads one growing text."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._tree = stop_tree(stops)
        self._node = 0
        self._num_read = 0

    def find(self, text: str, num_settled: int) -> tuple[int, str] | None:
        """Read on to the end of ``text``, which begins with what was read before.

        Returns where the first stop string begins that ends behind ``num_settled`` characters, and that string.
        """
        first: tuple[int, str] | None = None
        node, tree = self._node, self._tree
        for end in range(self._num_read, len(text)):
            node = tree.next(node, text[end])
            stop = tree.stops[node]
            if stop and end >= num_settled:
                found = end + 1 - len(stop), stop
                first = found if first is None else min(first, found)
        self._node, self._num_read = node, len(text)
        return first

    @property
    def num_open(self) -> int:
        """How many characters at the end of what was read begin a stop string."""
        return self._tree.num_open[self._node]
