"""A grammar as a network of states over bytes, with calls: what a JSON schema or a regular expression is compiled to.

    rule value    0 -"["-> 1 -call value-> 2 -"]"-> 3        a call stands for a whole path of another rule,
                  0 -"0"-> 3                                 so brackets match at any depth

(Recursive transition networks, Woods 1970, CACM 13. ``machine`` runs one.) ``depths`` is, for each state, the least
number of nested calls with which the end of its rule can be reached, or infinity if it cannot. So a path within a limit
on depth never runs into a dead end, and a grammar that no text satisfies is found here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from paged_infer.control.guided.automaton import Automaton, TooLargeError
from paged_infer.control.guided.characters import ByteRanges, Encoding, Ranges

MAX_STATES = 60_000
MAX_DEPTH = 64  # nested calls: arrays and objects inside each other, and references


class Network:
    """States are integers. Sets of bytes are integers too: bit b stands for byte b.

    Attributes:
        edges: for each state, (bytes, target).
        free: for each state, the targets of its epsilon transitions, which read no byte.
        calls: for each state, (rule, target after it).
        rules: (first state, last state); nothing leaves the last. Rule 0 is the whole grammar.
    """

    def __init__(self) -> None:
        self.edges: list[list[tuple[int, int]]] = []
        self.free: list[list[int]] = []
        self.calls: list[list[tuple[int, int]]] = []
        self.rules: list[tuple[int, int]] = []
        self.depths: list[float] = []
        self.new_rule()

    def new_state(self) -> int:
        if len(self.edges) >= MAX_STATES:
            raise TooLargeError(f"it needs more than {MAX_STATES} states: counts, lengths or lists are too long")
        self.edges.append([])
        self.free.append([])
        self.calls.append([])
        return len(self.edges) - 1

    def new_rule(self) -> int:
        self.rules.append((self.new_state(), self.new_state()))
        return len(self.rules) - 1

    def call(self, start: int, rule: int) -> int:
        end = self.new_state()
        self.calls[start].append((rule, end))
        return end

    def literal(self, start: int, text: bytes) -> int:
        for byte in text:
            end = self.new_state()
            self.edges[start].append((1 << byte, end))
            start = end
        return start

    def literals(self, start: int, texts: Iterable[bytes]) -> int:
        """One of the texts. Texts with a common prefix share its states."""
        end, begin = self.new_state(), self.new_state()
        self.free[start].append(begin)
        children: dict[tuple[int, int], int] = {}
        for text in dict.fromkeys(texts):
            state = begin
            for byte in text:
                if (state, byte) not in children:
                    children[state, byte] = self.literal(state, bytes([byte]))
                state = children[state, byte]
            self.free[state].append(end)
        return end

    def splice(self, start: int, automaton: Automaton, encoding: Encoding) -> int:
        """The strings of an automaton over characters. Characters with the same last bytes share states."""
        states = [self.new_state() for _ in automaton.edges]
        end = self.new_state()
        self.free[start].append(states[0])
        spelled: dict[Ranges, list[ByteRanges]] = {}
        rest: dict[tuple[tuple[tuple[int, int], ...], int], int] = {}  # by the last bytes and the target
        for state, (edges, free) in enumerate(zip(automaton.edges, automaton.free, strict=True)):
            self.free[states[state]] += [states[target] for target in free]
            sets: dict[int, int] = {}
            for ranges, target in edges:
                if ranges not in spelled:
                    spelled[ranges] = list(encoding(ranges))
                for parts in spelled[ranges]:
                    at = states[target]
                    for place in range(len(parts) - 1, 0, -1):
                        key = tuple(parts[place:]), states[target]
                        if key not in rest:
                            rest[key] = self.new_state()
                            self.edges[rest[key]].append((_byte_set(*parts[place]), at))
                        at = rest[key]
                    sets[at] = sets.get(at, 0) | _byte_set(*parts[0])
            self.edges[states[state]] += [(byte_set, target) for target, byte_set in sets.items()]
        for state in automaton.accepting:
            self.free[states[state]].append(end)
        return end

    def close(self, end: int) -> None:
        """Make ``end`` the end of the grammar, which is complete now, and compute ``depths``.

        Raises:
            ValueError: no text satisfies it, it nests too deep, or a rule is left-recursive (can call itself before
                any byte).
        """
        self.free[end].append(self.rules[0][1])
        self._refuse_circles()
        self._measure()
        if (depth := self.depths[self.rules[0][0]]) > MAX_DEPTH:
            raise ValueError(
                "nothing satisfies it" if depth == math.inf else f"it is nested more than {MAX_DEPTH} levels deep"
            )

    def _refuse_circles(self) -> None:
        """In the order in which rules can be left out, those first that begin with no other rule."""
        begins_with = [
            {rule for state in self._reached_free(start) for rule, _ in self.calls[state]} for start, _ in self.rules
        ]
        begun_by: list[list[int]] = [[] for _ in self.rules]
        for caller, called in enumerate(begins_with):
            for rule in called:
                begun_by[rule].append(caller)
        num_left = list(map(len, begins_with))
        done = [rule for rule, number in enumerate(num_left) if not number]
        for rule in done:
            for caller in begun_by[rule]:
                num_left[caller] -= 1
                if not num_left[caller]:
                    done.append(caller)
        if len(done) < len(self.rules):
            raise ValueError("a $ref leads back to itself with nothing in between")

    def _reached_free(self, start: int) -> list[int]:
        reached, seen = [start], {start}
        for state in reached:
            for target in self.free[state]:
                if target not in seen:
                    seen.add(target)
                    reached.append(target)
        return reached

    def _measure(self) -> None:
        """Compute ``depths`` from the ends of the rules backwards, until none becomes smaller."""
        before: list[list[int]] = [[] for _ in self.edges]
        called_before: list[list[tuple[int, int, int]]] = [[] for _ in self.edges]  # (state, rule, target)
        for state in range(len(self.edges)):
            for target in {*self.free[state], *(target for _, target in self.edges[state])}:
                before[target].append(state)
            for rule, target in self.calls[state]:
                for needed in {target, self.rules[rule][0]}:
                    called_before[needed].append((state, rule, target))
        self.depths = [math.inf] * len(self.edges)
        waiting = deque(end for _, end in self.rules)
        for end in waiting:
            self.depths[end] = 0
        while waiting:
            state = waiting.popleft()
            nearer = [(one, self.depths[state]) for one in before[state]]
            nearer += [(one, self.depth_of_call(rule, target)) for one, rule, target in called_before[state]]
            for one, depth in nearer:
                if depth < self.depths[one]:
                    self.depths[one] = depth
                    waiting.append(one)

    def depth_of_call(self, rule: int, target: int) -> float:
        return max(self.depths[self.rules[rule][0]] + 1, self.depths[target])


def _byte_set(first: int, last: int) -> int:
    return (1 << last + 1) - (1 << first)
