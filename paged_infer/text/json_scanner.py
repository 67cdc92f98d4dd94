"""Read JSON from a stream character by character: is it still valid, and what may come next?"""

from __future__ import annotations

import re
from enum import Enum

SPACE = " \t\n\r"
_SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null")
_IN_SCALARS = frozenset("+-.0123456789eE" + "truefalsn")
_ESCAPES = '"\\/bfnrt'
_HEX = frozenset("0123456789abcdefABCDEF")
_CLOSED_BY = {"{": "}", "[": "]"}


class Phase(Enum):
    """What the next character may be."""

    VALUE = "a value"
    FIRST_VALUE = "a value, or the end of an array"
    FIRST_KEY = "a key, or the end of an object"
    KEY = "a key"
    COLON = "a colon"
    AFTER = "a comma, or the end of an array or object"
    IN_KEY = "more of a key"
    IN_STRING = "more of a string"
    IN_SCALAR = "more of a number, or of true, false or null"
    END = "nothing: the document is complete"


class JsonScanner:
    """One JSON document, RFC 8259. ``depth`` counts the objects and arrays that are open."""

    def __init__(self) -> None:
        self.phase = Phase.VALUE
        self._open: list[str] = []  # "{" and "["
        self._scalar: list[str] = []
        self._escape = 0  # after a backslash: 1, then the hexadecimal digits of \u that are missing, negative

    @property
    def depth(self) -> int:
        return len(self._open)

    def feed(self, char: str) -> bool:
        """Read one character. Returns False if no JSON begins like this; do not call it again after that."""
        if self.phase in (Phase.IN_STRING, Phase.IN_KEY):
            return self._in_string(char)
        if self.phase is Phase.IN_SCALAR:
            if char in _IN_SCALARS:
                self._scalar.append(char)
                return True
            if not _SCALAR.fullmatch("".join(self._scalar)):
                return False
            self.phase = self._after_value()
        if char in SPACE:
            return True
        return self._between(char)

    def _in_string(self, char: str) -> bool:
        if self._escape == 1:
            self._escape = -4 if char == "u" else 0
            return char == "u" or char in _ESCAPES
        if self._escape < 0:
            self._escape += 1
            return char in _HEX
        if char == "\\":
            self._escape = 1
        elif char == '"':
            self.phase = Phase.COLON if self.phase is Phase.IN_KEY else self._after_value()
        return char >= " "

    def _between(self, char: str) -> bool:
        phase = self.phase
        if phase in (Phase.VALUE, Phase.FIRST_VALUE):
            return (phase is Phase.FIRST_VALUE and char == "]" and self._close()) or self._begin_value(char)
        if phase is Phase.COLON:
            self.phase = Phase.VALUE
            return char == ":"
        if phase in (Phase.KEY, Phase.FIRST_KEY):
            if char == "}" and phase is Phase.FIRST_KEY:
                return self._close()
            self.phase = Phase.IN_KEY
            return char == '"'
        if phase is Phase.AFTER and char == ",":
            self.phase = Phase.KEY if self._open[-1] == "{" else Phase.VALUE
            return True
        return phase is Phase.AFTER and char == _CLOSED_BY[self._open[-1]] and self._close()

    def _begin_value(self, char: str) -> bool:
        if char in _CLOSED_BY:
            self._open.append(char)
            self.phase = Phase.FIRST_KEY if char == "{" else Phase.FIRST_VALUE
        elif char == '"':
            self.phase = Phase.IN_STRING
        else:
            self.phase, self._scalar = Phase.IN_SCALAR, [char]
            return char in "-0123456789tfn"
        return True

    def _close(self) -> bool:
        self._open.pop()
        self.phase = self._after_value()
        return True

    def _after_value(self) -> Phase:
        return Phase.AFTER if self._open else Phase.END
