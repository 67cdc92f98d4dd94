"""Automata over characters: an NFA, the equivalent DFA, and the DFA of its strings of a limited length."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from paged_infer.control.guided.characters import Ranges, ranges_of

MAX_STATES = 4096


@dataclass(slots=True)
class Automaton:
    """An NFA or DFA over characters, with start state 0.

    For each state, ``edges`` lists (characters, target), and ``free`` the targets of its epsilon transitions, which
    read no character. A DFA has none of these, and the edges of a state have no character in common.
    """

    edges: list[list[tuple[Ranges, int]]] = field(default_factory=list)
    free: list[list[int]] = field(default_factory=list)
    accepting: set[int] = field(default_factory=set)

    def new_state(self) -> int:
        if len(self.edges) >= MAX_STATES:
            raise ValueError(f"it needs more than {MAX_STATES} states")
        self.edges.append([])
        self.free.append([])
        return len(self.edges) - 1


def determinised(nfa: Automaton) -> Automaton:
    """The subset construction: a DFA whose states are sets of states of ``nfa``."""
    dfa, place = Automaton(), dict[frozenset[int], int]()
    waiting = deque[frozenset[int]]()

    def state_of(members: Iterable[int]) -> int:
        closed = frozenset(_closure(nfa, members))
        if closed not in place:
            place[closed] = dfa.new_state()
            waiting.append(closed)
        return place[closed]

    state_of([0])
    while waiting:
        members = waiting.popleft()
        state = place[members]
        if not nfa.accepting.isdisjoint(members):
            dfa.accepting.add(state)
        by_targets: dict[frozenset[int], list[tuple[int, int]]] = {}
        edges = [edge for member in members for edge in nfa.edges[member]]
        for first, last, targets in _pieces(edges):
            by_targets.setdefault(targets, []).append((first, last))
        for targets, pieces in sorted(by_targets.items(), key=lambda item: item[1]):
            dfa.edges[state].append((ranges_of(pieces), state_of(targets)))
    return dfa


def limited(dfa: Automaton, low: int, high: int | None) -> Automaton:
    """The strings of ``dfa`` that have ``low`` to ``high`` characters. The new states also count characters."""
    counted, place = Automaton(), dict[tuple[int, int], int]()
    waiting = deque[tuple[int, int]]()

    def state_of(state: int, count: int) -> int:
        key = state, min(count, low) if high is None else count
        if key not in place:
            place[key] = counted.new_state()
            waiting.append(key)
        return place[key]

    state_of(0, 0)
    while waiting:
        state, count = waiting.popleft()
        here = place[state, count]
        if state in dfa.accepting and count >= low:
            counted.accepting.add(here)
        if high is None or count < high:
            counted.edges[here] = [(ranges, state_of(target, count + 1)) for ranges, target in dfa.edges[state]]
    return counted


def _closure(nfa: Automaton, states: Iterable[int]) -> set[int]:
    seen, waiting = set(states), list(states)
    while waiting:
        for target in nfa.free[waiting.pop()]:
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen


def _pieces(edges: list[tuple[Ranges, int]]) -> Iterable[tuple[int, int, frozenset[int]]]:
    """Cut the characters of the edges into pieces (first, last), all of whose characters have the same targets."""
    cuts: dict[int, list[tuple[int, int]]] = {}  # at a character: targets that gain (1) or lose (-1) an edge there
    for ranges, target in edges:
        for first, last in ranges:
            cuts.setdefault(first, []).append((target, 1))
            cuts.setdefault(last + 1, []).append((target, -1))
    counts: dict[int, int] = {}
    before = 0
    for at in sorted(cuts):
        if targets := frozenset(target for target, count in counts.items() if count):
            yield before, at - 1, targets
        for target, change in cuts[at]:
            counts[target] = counts.get(target, 0) + change
        before = at
