"""Automata over characters: an NFA, the equivalent DFA, and the DFA of its strings of a limited length."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from paged_infer.control.guided.characters import Ranges, ranges_of

MAX_STATES = 4096
MAX_EDGES = 100_000
MAX_WORK = 1_000_000  # states, edges and ranges that are visited while an automaton is made: about a second


class TooLargeError(ValueError):
    """A grammar that would take too much time or memory."""


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
            raise TooLargeError(f"it needs more than {MAX_STATES} states")
        self.edges.append([])
        self.free.append([])
        return len(self.edges) - 1


def determinised(nfa: Automaton) -> Automaton:
    """The subset construction: a DFA whose states are sets of states of ``nfa``.

    Only states with edges, and accepting ones, are in the sets: sets that differ in others would be alike.

    Raises:
        TooLargeError: it has too many states or edges, or there is too much to visit.
    """
    dfa, place = Automaton(), dict[frozenset[int], int]()
    after = dict[frozenset[int], int]()  # by targets of edges
    waiting = deque[frozenset[int]]()
    forward = [_forward(nfa, state) for state in range(len(nfa.edges))]
    num_edges = work = 0

    def spend(amount: int) -> None:
        nonlocal work
        work += amount
        if work > MAX_WORK:
            raise TooLargeError("its alternatives and repetitions multiply")

    def state_of(targets: frozenset[int]) -> int:
        if targets not in after:
            reached = _closure(nfa, targets)
            spend(len(reached))
            closed = frozenset(one for one in reached if nfa.edges[one] or one in nfa.accepting)
            if closed not in place:
                place[closed] = dfa.new_state()
                waiting.append(closed)
            after[targets] = place[closed]
        return after[targets]

    state_of(frozenset([0]))
    while waiting:
        members = waiting.popleft()
        state = place[members]
        if not nfa.accepting.isdisjoint(members):
            dfa.accepting.add(state)
        by_targets: dict[frozenset[int], list[tuple[int, int]]] = {}
        edges = [(ranges, forward[target]) for member in members for ranges, target in nfa.edges[member]]
        spend(sum(len(ranges) for ranges, _ in edges))
        for first, last, targets in _pieces(edges):
            by_targets.setdefault(targets, []).append((first, last))
            spend(len(targets))
        by_state: dict[int, list[tuple[int, int]]] = {}
        for targets, pieces in sorted(by_targets.items(), key=lambda item: item[1]):
            by_state.setdefault(state_of(targets), []).extend(pieces)
        num_edges = _checked(num_edges + len(by_state))
        dfa.edges[state] = [(ranges_of(pieces), target) for target, pieces in by_state.items()]
    return dfa


def limited(dfa: Automaton, low: int, high: int | None) -> Automaton:
    """The strings of ``dfa`` that have ``low`` to ``high`` characters. The new states also count characters."""
    counted, place = Automaton(), dict[tuple[int, int], int]()
    waiting = deque[tuple[int, int]]()
    num_edges = 0

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
            num_edges = _checked(num_edges + len(dfa.edges[state]))
            counted.edges[here] = [(ranges, state_of(target, count + 1)) for ranges, target in dfa.edges[state]]
    return counted


def _checked(num_edges: int) -> int:
    if num_edges > MAX_EDGES:
        raise TooLargeError(f"it needs more than {MAX_EDGES} edges")
    return num_edges


def _forward(nfa: Automaton, state: int) -> int:
    """The first state from here on with edges, or more than one way on: the alternatives of a pattern end in one."""
    seen = {state}
    while not nfa.edges[state] and len(nfa.free[state]) == 1 and nfa.free[state][0] not in seen:
        if state in nfa.accepting:
            break
        state = nfa.free[state][0]
        seen.add(state)
    return state


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
        if counts:
            yield before, at - 1, frozenset(counts)
        for target, change in cuts[at]:
            counts[target] = counts.get(target, 0) + change
            if not counts[target]:
                del counts[target]
        before = at
