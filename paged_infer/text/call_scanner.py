"""One tool call, {"name": ..., "arguments": {...}}, read character by character."""

from __future__ import annotations

import json

from paged_infer.text.json_scanner import SPACE, JsonScanner, Phase

ARGUMENTS = ("arguments", "parameters")  # the names in Hermes' and Llama's format


class CallScanner:
    """Reads an object with "name" and with "arguments" or "parameters", in any order; other members are skipped."""

    def __init__(self) -> None:
        self._json = JsonScanner()
        self._key = ""  # of the member that is being read
        self._member: list[str] | None = None  # the characters so far of its key, and then of its value
        self._unsent: list[str] = []  # of the arguments
        self._has_arguments = False  # whether the object of the arguments has begun
        self.has_all_arguments = False  # whether it has been closed
        self.name: str | None = None

    @property
    def is_complete(self) -> bool:
        return self._json.phase is Phase.END

    @property
    def is_certain(self) -> bool:
        """Whether it is a call, whatever follows: its name is known, and its arguments have begun or it is complete."""
        return self.name is not None and (self._has_arguments or self.is_complete)

    def take_arguments(self) -> str:
        """The text of the arguments since the last call of this method; ``{}`` for a complete tool call without any."""
        if self.is_complete and not self._has_arguments:
            self._has_arguments = True
            return "{}"
        taken, self._unsent = "".join(self._unsent), []
        return taken

    def feed(self, char: str) -> bool:
        """Read one character. Returns False if no tool call begins like this; do not call it again after that."""
        scanner = self._json
        before, depth = scanner.phase, scanner.depth
        if depth == 0 and char not in SPACE + "{":
            return False
        if depth == 1 and before in (Phase.FIRST_KEY, Phase.KEY, Phase.VALUE) and char not in SPACE + "}":
            self._member = []
            if before is Phase.VALUE and self._key in ARGUMENTS:
                if char != "{" or self._has_arguments:  # not an object, or given twice
                    return False
                self._has_arguments = True
        if not scanner.feed(char):
            return False
        if self._member is None:
            return True
        is_behind_scalar = depth == 1 and before is Phase.IN_SCALAR and scanner.phase is not Phase.IN_SCALAR
        if not is_behind_scalar:
            self._member.append(char)
            if self._key in ARGUMENTS:
                self._unsent.append(char)
        if is_behind_scalar or (scanner.depth == 1 and scanner.phase in (Phase.COLON, Phase.AFTER)):
            return self._end_member(is_key=scanner.phase is Phase.COLON)
        return True

    def _end_member(self, is_key: bool) -> bool:
        text, self._member = "".join(self._member or ()), None
        if is_key:
            self._key = json.loads(text)
            return True
        if self._key == "name":
            if self.name is not None or not text.startswith('"') or text == '""':
                return False
            self.name = json.loads(text)
        self.has_all_arguments |= self._key in ARGUMENTS
        self._key = ""
        return True
