"""Find the first stop string in a growing text, at a cost that does not depend on the number of stop strings.

All stop strings form one tree, and each character of the text is one step in it (Aho and Corasick 1975). The current
node stands for the longest suffix of the text that is a prefix of a stop string:

    stops "hers", "she"       h - e - r - s*             text   u   s   h     e*     r
                              s - h - e*                 node   .   s   sh    she    her, by the link from she to he
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache


class StopTree:
    """Stop strings as a tree with root 0. Each list has one entry per node."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.links = [0]  # to the node of the longest proper suffix that is a prefix of a stop string
        self.stops = [""]  # the longest stop string that ends here, if any
        self.num_open = [0]  # length of the longest suffix that may still grow into a stop string
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
        queue = deque([0])  # breadth first: links lead to shallower nodes
        while queue:
            node = queue.popleft()
            self.num_open[node] = depths[node] if self.children[node] else self.num_open[self.links[node]]
            for char, child in self.children[node].items():
                self.links[child] = self.next(self.links[node], char) if node else 0
                self.stops[child] = self.stops[child] or self.stops[self.links[child]]
                queue.append(child)

    def next(self, node: int, char: str) -> int:
        """The node after ``node`` and one more character."""
        while node and char not in self.children[node]:
            node = self.links[node]
        return self.children[node].get(char, 0)


@lru_cache(maxsize=8)
def stop_tree(stops: tuple[str, ...]) -> StopTree:
    """Cached, so that all samples of a request share one tree."""
    return StopTree(stops)


class StopFinder:
    """Searches one growing text."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._tree = stop_tree(stops)
        self._node = 0
        self._num_read = 0

    def find(self, text: str, num_settled: int) -> tuple[int, str] | None:
        """Continue the search to the end of ``text``, which begins with the text of the last call.

        Of the stop strings that end after the first ``num_settled`` characters, returns the one that begins first: its
        start and itself. Of two that begin together, the shorter one; None if there is none.
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
        """How many characters at the end of the text may still grow into a stop string."""
        return self._tree.num_open[self._node]
