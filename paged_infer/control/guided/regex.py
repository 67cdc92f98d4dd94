"""Compile regular expressions to DFAs: parse, Thompson's NFA (1968, CACM 11), subset construction.

    a(b|c)*     NFA   0 -a-> 1 -> 2 ;  2 -> 3 -b-> 5 ;  2 -> 4 -c-> 6 ;  5, 6 -> 2        no letter: epsilon transition
                DFA   {0} -a-> {1 2 3 4} ;  {1 2 3 4} -b-> {5 2 3 4} ;  ...               a state is a set of NFA states

Supported: literals, ``.``, classes ``[a-z]`` ``[^a-z]``, ``\\d \\w \\s \\D \\W \\S``, ``\\t \\n \\r \\f \\v \\0 \\xHH
\\uHHHH`` and escaped punctuation, groups ``( )`` ``(?: )`` ``(?<name> )`` ``(?P<name> )``, ``|``, ``* + ? {m} {m,}
{m,n}`` also followed by ``?`` (which changes what is matched, not what matches), ``^`` at the start of the pattern and
``$`` at its end. Anything else is refused by name.

Python and ECMAScript differ in some of these beyond ASCII. Here a pattern stands for the texts that match in both:
``\\d \\w \\D \\W`` are ASCII only, ``.`` is not a line terminator, and ``\\S`` is not a Unicode space.
"""

from __future__ import annotations

from paged_infer.control.guided.automaton import MAX_STATES, Automaton, determinised
from paged_infer.control.guided.characters import ANY, Ranges, complement, intersection, ranges_of

MAX_CHARACTERS = 32_768  # of a pattern

_DIGITS = ranges_of([(ord("0"), ord("9"))])
_WORD = ranges_of([(ord(a), ord(b)) for a, b in ("09", "AZ", "az", "__")])
_SPACES = ranges_of([(9, 13), (32, 32)])
_UNICODE_SPACES = (
    (9, 13), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
    (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
)  # fmt: skip
_ASCII = ranges_of([(0, 0x7F)])
_NEGATED = {  # characters that both languages put outside a class escape
    "d": intersection(complement(_DIGITS), _ASCII),
    "w": intersection(complement(_WORD), _ASCII),
    "s": complement(ranges_of(_UNICODE_SPACES)),
}
_CLASSES = {"d": _DIGITS, "w": _WORD, "s": _SPACES, **{name.upper(): kept for name, kept in _NEGATED.items()}}
_DOT = complement(ranges_of([(10, 10), (13, 13), (0x2028, 0x2029)]))
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}


def regex_dfa(pattern: str, *, is_searched: bool = False) -> Automaton:
    """The DFA of the texts that match ``pattern`` as a whole, or, with ``is_searched``, contain a match.

    Raises:
        ValueError: the pattern is malformed, uses what is not supported, or needs more than ``MAX_STATES`` states; the
            message gives the pattern and the reason.
    """
    try:
        return determinised(_Parser(pattern, is_searched).parse())
    except ValueError as error:
        shown = pattern if len(pattern) <= 200 else pattern[:200] + "..."
        raise ValueError(f"{shown!r}: {error}") from None


class _Parser:
    """Recursive descent. Each method adds a part of the pattern to the NFA from a state; returns the state after it."""

    def __init__(self, pattern: str, is_searched: bool) -> None:
        self.pattern, self.at, self.is_searched = pattern, 0, is_searched
        self.nfa = Automaton()
        self._classes: dict[int, tuple[Ranges, int]] = {}  # by where they begin: their characters, and where they end

    def parse(self) -> Automaton:
        if len(self.pattern) > MAX_CHARACTERS:
            raise ValueError(f"it has more than {MAX_CHARACTERS} characters")
        start = self.nfa.new_state()
        if not self._take("^") and self.is_searched:
            self._loop(start, ANY)
        end = self._union(start)
        if self.at < len(self.pattern):
            raise ValueError(f"unbalanced ) at {self.at}")
        if self.is_searched and not self._ends_with_anchor:
            self._loop(end, ANY)
        self.nfa.accepting.add(end)
        return self.nfa

    def _loop(self, state: int, ranges: Ranges) -> None:
        self.nfa.edges[state].append((ranges, state))

    @property
    def _ends_with_anchor(self) -> bool:
        head = self.pattern.removesuffix("$")
        return head != self.pattern and (len(head) - len(head.rstrip("\\"))) % 2 == 0

    def _take(self, text: str) -> bool:
        found = self.pattern.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def _union(self, start: int, depth: int = 0) -> int:
        if depth > 100:
            raise ValueError("more than 100 nested groups")
        end = self.nfa.new_state()
        is_anchored = self.pattern.startswith("^") or self._ends_with_anchor
        while True:
            branch = self.nfa.new_state()
            self.nfa.free[start].append(branch)
            self.nfa.free[self._sequence(branch, depth)].append(end)
            if not self._take("|"):
                return end
            if is_anchored and not depth:
                raise ValueError("^ or $ next to | is not supported: put the alternatives in a group, ^(?:a|b)$")

    def _sequence(self, state: int, depth: int) -> int:
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            if self.pattern[self.at] == "$" and self.at == len(self.pattern) - 1:
                self.at += 1
                break
            state = self._repeated(state, depth)
        return state

    def _repeated(self, start: int, depth: int) -> int:
        begin = self.at
        first = self.nfa.new_state()  # a state of its own, so that a loop does not return to what comes before
        self.nfa.free[start].append(first)
        end = self._atom(first, depth)
        counts = self._counts()
        if counts is None:
            return end
        (low, high), after = counts, self.at
        if self._counts() is not None or self._take("+"):
            raise ValueError(f"two quantifiers at {after}: possessive and nested quantifiers are not supported")
        skips = [] if low else [first]  # from where the rest of the copies may be left out
        for count in range(1, max(low, 1 if high is None else high)):  # copies: parsed again, from the same text
            self.at = begin
            copy = self.nfa.new_state()
            self.nfa.free[end].append(copy)
            last, first, end = end, copy, self._atom(copy, depth)
            if count >= low:
                skips.append(last)
        for state in skips:
            self.nfa.free[state].append(end)
        self.at = after
        if high is None:
            self.nfa.free[end].append(first)
        elif high == 0:
            self.nfa.edges[first], self.nfa.free[first] = [], [end]
        return end

    def _counts(self) -> tuple[int, int | None] | None:
        """The quantifier here, if there is one: (minimum, maximum)."""
        counts: tuple[int, int | None] | None = None
        for sign, found in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if counts is None and self._take(sign):
                counts = found
        close = self.pattern.find("}", self.at)
        if counts is None and self._take("{"):
            low, comma, high = self.pattern[self.at : close].partition(",")
            if close < 0 or not _is_number(low) or not (_is_number(high) or not high):
                raise ValueError(f"broken quantifier at {self.at - 1}: expected {{m}}, {{m,}} or {{m,n}}")
            counts = int(low), int(high) if high else None if comma else int(low)
            self.at = close + 1
            if max(counts[0], counts[1] or 0) > MAX_STATES:
                raise ValueError(f"it needs more than {MAX_STATES} states")
            if counts[1] is not None and counts[1] < counts[0]:
                raise ValueError(f"quantifier {{{low},{high}}}: its maximum is below its minimum")
        if counts is not None:
            self._take("?")
        return counts

    def _atom(self, start: int, depth: int) -> int:
        at, character = self.at, self.pattern[self.at]
        if self._take("("):
            if self._take("?"):
                self._group_name()
            end = self._union(start, depth + 1)
            if not self._take(")"):
                raise ValueError(f"missing ) for the group at {at}")
            return end
        if character in "*+?{":
            raise ValueError(f"nothing to repeat at {at}")
        if character in "^$":
            raise ValueError(f"{character} at {at} is not supported: only ^ at the start and $ at the end are")
        self.at += 1
        if character == "[":
            if at not in self._classes:  # a copy is parsed again, and a class may be long
                self._classes[at] = self._class(at), self.at
            ranges, self.at = self._classes[at]
        elif character == "\\":
            ranges = self._escape()
        else:
            ranges = _DOT if character == "." else _single(ord(character))
        end = self.nfa.new_state()
        self.nfa.edges[start].append((ranges, end))
        return end

    def _group_name(self) -> None:
        if self._take(":"):
            return
        kinds = {"=": "lookahead", "!": "negative lookahead", "<=": "lookbehind", "<!": "negative lookbehind"}
        for sign, kind in kinds.items():
            if self._take(sign):
                raise ValueError(f"{kind} (?{sign} is not supported")
        close = self.pattern.find(">", self.at)
        if not (self._take("P<") or self._take("<")) or not self.pattern[self.at : close].isidentifier():
            raise ValueError(f"(?{self.pattern[self.at : self.at + 1]} is not supported")
        self.at = close + 1

    def _class(self, at: int) -> Ranges:
        is_negated, names, pairs = self._take("^"), list[str](), list[tuple[int, int]]()
        while not self._take("]"):
            if self.at >= len(self.pattern):
                raise ValueError(f"missing ] for the class at {at}")
            first = self._class_part(names)
            if len(first) == 1 and first[0][0] == first[0][1] and self._is_range():
                self.at += 1
                last = self._class_part(names)
                if len(last) != 1 or last[0][0] != last[0][1] or last[0][0] < first[0][0]:
                    raise ValueError(f"broken range in the class at {at}")
                first = ((first[0][0], last[0][0]),)
            pairs += first
        if not pairs:
            raise ValueError(f"the class at {at} is empty; a ] in a class is written \\]")
        if not is_negated:
            return ranges_of(pairs)
        kept = complement(ranges_of(pairs))
        for name in dict.fromkeys(names):  # what the languages differ on is in neither
            kept = intersection(kept, _CLASSES[name.swapcase()])
        return kept

    def _is_range(self) -> bool:
        return self.pattern.startswith("-", self.at) and not self.pattern.startswith("-]", self.at)

    def _class_part(self, names: list[str]) -> Ranges:
        character = self.pattern[self.at : self.at + 1]
        self.at += 1
        if character != "\\":
            return _single(ord(character)) if character else ()
        if self.pattern[self.at : self.at + 1] in tuple(_CLASSES):
            names.append(self.pattern[self.at])
        return _single(8) if self._take("b") else self._escape()  # in a class, \b is a backspace

    def _escape(self) -> Ranges:
        character = self.pattern[self.at : self.at + 1]
        self.at += 1
        if character in _CLASSES:
            return _CLASSES[character]
        if character in ("x", "u"):
            digits = self.pattern[self.at : self.at + (2 if character == "x" else 4)]
            if len(digits) < (2 if character == "x" else 4) or not set(digits) <= set("0123456789abcdefABCDEF"):
                raise ValueError(f"broken escape \\{character}{digits}")
            self.at += len(digits)
            return _single(int(digits, 16))
        if character in _CONTROLS and not (character == "0" and self.pattern[self.at : self.at + 1].isdecimal()):
            return _single(_CONTROLS[character])
        if not character:
            raise ValueError("the pattern ends with a backslash")
        if character.isalnum():
            kind = "a backreference" if character.isdecimal() else "an escape"
            raise ValueError(f"\\{character} is {kind} that is not supported")
        return _single(ord(character))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _single(character: int) -> Ranges:
    return ((character, character),)
