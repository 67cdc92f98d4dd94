"""JSON numbers within bounds, as automata that compare each digit with the bounds' digits.

    5 <= x <= 123, two digits      1 to 9: more digits than the lower bound, fewer than the upper one, so any follow
                   three digits    1, equal to the upper bound so far: then 0 or 1, and any follow;
                                   or 2, still equal: then 0 to 3

Numbers have no exponent and at most 15 significant digits, as many as a float64 can tell apart (integers: 18).
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import NamedTuple

from paged_infer.control.guided.automaton import Automaton
from paged_infer.control.guided.characters import Ranges

MAX_DIGITS, MAX_INTEGER_DIGITS = 15, 18


class Bound(NamedTuple):
    value: Decimal
    is_open: bool  # exclusive


def max_digits(is_integer: bool) -> int:
    return MAX_INTEGER_DIGITS if is_integer else MAX_DIGITS


def are_satisfiable(low: Bound | None, high: Bound | None, is_integer: bool) -> bool:
    """Whether there is a number between the bounds, of however many digits."""
    if low is None or high is None:
        return True
    if is_integer:
        first, last = int(low.value.to_integral_value(ROUND_CEILING)), int(high.value.to_integral_value(ROUND_FLOOR))
        return first + (low.is_open and first == low.value) <= last - (high.is_open and last == high.value)
    return low.value < high.value or (low.value == high.value and not (low.is_open or high.is_open))


def ends(numbers: Automaton) -> bool:
    """Whether ``number_automaton`` has found a number."""
    return not numbers.accepting.isdisjoint(target for targets in numbers.free for target in targets)


def number_automaton(low: Bound | None, high: Bound | None, *, is_integer: bool) -> Automaton:
    """The numbers between the bounds; None for no bound."""
    automaton = Automaton()
    start, end = automaton.new_state(), automaton.new_state()
    automaton.accepting.add(end)
    if high is None or high.value >= 0:
        above = low if low is not None and low.value >= 0 else Bound(Decimal(0), False)
        _Magnitudes(automaton, above, high, is_integer).add(start, end)
    if low is None or low.value < 0:
        minus = automaton.new_state()
        automaton.edges[start].append((_single("-"), minus))
        above = Bound(-high.value, high.is_open) if high is not None and high.value < 0 else Bound(Decimal(0), True)
        below = None if low is None else Bound(-low.value, low.is_open)
        _Magnitudes(automaton, above, below, is_integer).add(minus, end)
    return automaton


class _Magnitudes:
    """Numbers without a sign. A state is how many digits were read, and whether they equal those of a bound."""

    def __init__(self, automaton: Automaton, low: Bound, high: Bound | None, is_integer: bool) -> None:
        self.automaton, self.low, self.high, self.is_integer = automaton, low, high, is_integer
        self.most = max_digits(is_integer)
        self.states: dict[tuple[int, int, bool, bool, bool], int] = {}

    def add(self, start: int, end: int) -> None:
        low, _ = _digits(self.low.value)
        high = "9" * (self.most + 1) if self.high is None else _digits(self.high.value)[0]
        for size in range(len(low), min(len(high), self.most) + 1):  # of the integer part
            first = self._state(size, 0, size == len(low), size == len(high), False, end)
            self.automaton.free[start].append(first)

    def _state(self, size: int, place: int, at_low: bool, at_high: bool, is_dotted: bool, end: int) -> int:
        """The state before digit ``place``, of ``size`` before the point. ``at_low``: equal to that bound so far."""
        key = size, place, at_low, at_high, is_dotted
        if key in self.states:
            return self.states[key]
        here = self.states[key] = self.automaton.new_state()
        if place >= size and is_dotted == (place > size) and self._is_within(size, place, at_low, at_high):
            self.automaton.free[here].append(end)
        if place == size and not is_dotted:
            if not self.is_integer and place < self.most:
                after = self._state(size, place, at_low, at_high, True, end)
                self.automaton.edges[here].append((_single("."), after))
        elif place < self.most:
            for digit in self._allowed(size, place, at_low, at_high):
                still_low = at_low and digit == self._digit(self.low, size, place)
                still_high = at_high and digit == self._digit(self.high, size, place)
                after = self._state(size, place + 1, still_low, still_high, is_dotted, end)
                self.automaton.edges[here].append((_single(digit), after))
        return here

    def _allowed(self, size: int, place: int, at_low: bool, at_high: bool) -> Iterator[str]:
        for digit in "0123456789":
            is_leading_zero = digit == "0" and place == 0 and size > 1
            below = at_low and digit < self._digit(self.low, size, place)
            above = at_high and digit > self._digit(self.high, size, place)
            if not (is_leading_zero or below or above):
                yield digit

    def _is_within(self, size: int, place: int, at_low: bool, at_high: bool) -> bool:
        """Whether the digits so far, as a complete number, are within the bounds."""
        if at_low and (self._rest(self.low, size, place) or self.low.is_open):
            return False
        return not (at_high and self.high is not None and self.high.is_open and not self._rest(self.high, size, place))

    def _digit(self, bound: Bound | None, size: int, place: int) -> str:
        assert bound is not None
        whole, fraction = _digits(bound.value)
        return (whole + fraction)[place] if place < size + len(fraction) else "0"

    def _rest(self, bound: Bound, size: int, place: int) -> bool:
        """Whether the bound has digits other than 0 from ``place`` on."""
        whole, fraction = _digits(bound.value)
        return any(digit != "0" for digit in (whole + fraction)[place:])


def _digits(value: Decimal) -> tuple[str, str]:
    whole, _, fraction = format(value, "f").partition(".")
    return whole, fraction


def _single(character: str) -> Ranges:
    return ((ord(character), ord(character)),)
