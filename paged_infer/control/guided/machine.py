"""Run a network byte by byte. A state of the machine is computed when a text first reaches it, and kept.

A *configuration* is a state of the network with a stack of the states to return to. A state of the machine is the set
of configurations that the bytes so far may have led to (the subset construction, one state at a time). For a regular
expression the stacks are empty, and the machine is its DFA over bytes.

Bytes that no edge of the network distinguishes form one class, and a state has one successor for each class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from paged_infer.control.guided.network import MAX_DEPTH, Network

MAX_KEPT_STATES = 20_000  # beyond this, states that no sequence is in are dropped
MAX_READINGS = 64  # parses of an ambiguous text that are followed at one place; each of them alone can be completed
MAX_CONFIGURATIONS = 4096  # of a state, at all places together

_Stack = tuple["_Stack", int, int]  # the stack below, the state to return to, the height; or None
Configuration = tuple[int, _Stack | None]


class GrammarError(Exception):
    """A grammar cannot go on; only its own request fails."""


class State:
    """What may follow the bytes so far.

    Attributes:
        is_accepting: the text may end here.
        successors: for each class of bytes, the state after one of them, or None.
        loops: the set of bytes that lead back to this state.
        mask: the tokens that may follow, once computed; see ``Vocabulary.mask``.
    """

    __slots__ = ("configurations", "is_accepting", "loops", "mask", "successors")

    def __init__(self, configurations: tuple[Configuration, ...], is_accepting: bool) -> None:
        self.configurations = configurations
        self.is_accepting = is_accepting
        self.successors: list[State | None] | None = None
        self.loops = 0
        self.mask: bytes | None = None


class Machine:
    """Runs one network.

    Attributes:
        start: the state before the first byte.
        class_of: the class of each byte.
        num_followed: configurations that were followed so far, by a byte each.

    Raises:
        GrammarError: here or later, it has more than ``MAX_CONFIGURATIONS`` at once.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._depths = network.depths
        sets = list({byte_set for edges in network.edges for byte_set, _ in edges})
        signatures = [tuple(byte_set >> byte & 1 for byte_set in sets) for byte in range(256)]
        classes = {signature: place for place, signature in enumerate(dict.fromkeys(signatures))}
        self.class_of = [classes[signature] for signature in signatures]
        self._bytes_of = [0] * len(classes)
        for byte, its_class in enumerate(self.class_of):
            self._bytes_of[its_class] |= 1 << byte
        in_set = {s: tuple(c for c, of_class in enumerate(self._bytes_of) if s & of_class) for s in sets}
        self._edges = [[(in_set[byte_set], target) for byte_set, target in edges] for edges in network.edges]
        self._states: dict[tuple[frozenset[Configuration], bool], State] = {}
        self.num_followed = 0  # configurations that were followed, by a byte each
        start = self._state([(network.rules[0][0], None)])
        assert start is not None  # ``Network.close`` refuses a grammar that nothing satisfies
        self.start = start

    def step(self, state: State, text: bytes) -> State | None:
        """The state after ``text``; None if it cannot follow."""
        class_of, at = self.class_of, state
        for byte in text:
            after = (at.successors or self.expand(at))[class_of[byte]]
            if after is None:
                return None
            at = after
        return at

    def expand(self, state: State) -> list[State | None]:
        """Compute ``state.successors`` and ``state.loops``."""
        targets: list[list[Configuration]] = [[] for _ in self._bytes_of]
        for place, stack in state.configurations:
            for classes, target in self._edges[place]:
                self.num_followed += len(classes)
                for its_class in classes:
                    targets[its_class].append((target, stack))
        found: dict[tuple[Configuration, ...], State | None] = {}
        successors: list[State | None] = []
        for its_class, reached in enumerate(targets):
            key = tuple(reached)
            if key not in found:
                found[key] = self._state(reached)
            successors.append(found[key])
            if found[key] is state:
                state.loops |= self._bytes_of[its_class]
        state.successors = successors
        return successors

    def forced_byte(self, state: State) -> int | None:
        """The only byte that may follow; None if there are several, or if the text may end here."""
        successors = state.successors or self.expand(state)
        alive = [its_class for its_class, after in enumerate(successors) if after is not None]
        if state.is_accepting or len(alive) != 1 or self._bytes_of[alive[0]].bit_count() != 1:
            return None
        return self._bytes_of[alive[0]].bit_length() - 1

    def is_final(self, state: State) -> bool:
        """Whether the text is complete and nothing can follow."""
        return state.is_accepting and not any(state.successors or self.expand(state))

    def _state(self, reached: list[Configuration]) -> State | None:
        """The state of these configurations and all that they reach without a byte; None for a dead end.

        Raises:
            GrammarError: it has more than ``MAX_CONFIGURATIONS``.
        """
        found = self._closure(reached)
        if found is None:  # sorted, so that only the text decides which parses are kept
            found = self._closure(sorted(set(reached), key=_places), drops=True)
        if found is None:
            raise GrammarError(f"it has more than {MAX_CONFIGURATIONS} alternatives at once")
        kept, is_accepting = found
        if not kept and not is_accepting:
            return None
        key = frozenset(kept), is_accepting
        state = self._states.get(key)
        if state is None:
            if len(self._states) >= MAX_KEPT_STATES:
                self._forget()
            state = self._states[key] = State(tuple(kept), is_accepting)
        return state

    def _closure(
        self, reached: Iterable[Configuration], drops: bool = False
    ) -> tuple[list[Configuration], bool] | None:
        """Of ``reached`` and all that it reaches without a byte: those with edges, and whether the text may end there.

        None if they are too many: in all, or, unless ``drops``, with more than ``MAX_READINGS`` at one place. With
        ``drops``, the first that many of each place are followed.
        """
        network, depths = self._network, self._depths
        last = network.rules[0][1]
        seen = dict.fromkeys(reached)
        waiting = list(seen)
        kept: list[Configuration] = []
        num_at: dict[int, int] = {}  # configurations at each place; without ``drops``, only once there are many in all
        is_accepting = False
        while waiting:
            configuration = waiting.pop()
            place, stack = configuration
            left = MAX_DEPTH - (0 if stack is None else stack[2])
            if depths[place] > left:
                continue
            if drops or len(seen) > MAX_READINGS:
                num_at[place] = num_at.get(place, 0) + 1
                if num_at[place] > MAX_READINGS and drops:
                    continue
                if num_at[place] > MAX_READINGS or len(kept) > MAX_CONFIGURATIONS:
                    return None
            if self._edges[place]:
                kept.append(configuration)
            after = [(target, stack) for target in network.free[place]]
            for call in network.calls[place]:
                if network.depth_of_call(*call) <= left:
                    rule, target = call
                    above = stack, target, MAX_DEPTH - left + 1
                    after.append((network.rules[rule][0], above))  # type: ignore[arg-type]
            if not (network.free[place] or network.calls[place] or self._edges[place]):  # the end of a rule
                if stack is not None:
                    after.append((stack[1], stack[0]))
                elif place == last:
                    is_accepting = True
            for one in after:
                if one not in seen:
                    seen[one] = None
                    waiting.append(one)
        is_crowded = len(seen) > MAX_READINGS and max(Counter(place for place, _ in seen).values()) > MAX_READINGS
        return None if is_crowded and not drops else (kept, is_accepting)

    def _forget(self) -> None:
        """Drop all states but the first. For those that a sequence is in, the successors are computed again."""
        for state in self._states.values():
            state.successors, state.loops = None, 0  # otherwise the first state would keep all of them
        self._states.clear()
        self._states[frozenset(self.start.configurations), self.start.is_accepting] = self.start


def _places(configuration: Configuration) -> list[int]:
    """To sort by: its place, and those that it returns to."""
    place, stack = configuration
    found = [place]
    while stack is not None:
        found.append(stack[1])
        stack = stack[0]
    return found
