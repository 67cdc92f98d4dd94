"""Parse tool calls in a model's output while it grows: text in, pieces of content and of calls out.

    hermes        Let me look. <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>
    llama3_json   {"name": "weather", "parameters": {"city": "Oslo"}}; {"name": ...}
                                                    ^ from here on it is certain that this is a call

The result does not depend on how the text is split. A call is certain once its name is known and the object of its
arguments has begun; from then on its parts are sent as they come. Text that fails to become a call before that is
content, every character of it. What was sent cannot be taken back: if the arguments turn out not to be valid JSON, the
rest of the call is sent as the model wrote it. Checking arguments and names is left to the client, as with OpenAI and
vLLM.

Whitespace before and between calls belongs to the format. Unlike in vLLM, text after a call is content, too.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from paged_infer.text.call_scanner import CallScanner
from paged_infer.text.json_scanner import SPACE


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """The new part of one call: ``id`` and ``name`` in its first delta, then pieces of the JSON of its arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Delta(NamedTuple):
    """What a piece of output adds to an answer."""

    content: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    reasoning: str = ""


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class Place(Enum):
    """Where in the output a parser is."""

    CONTENT = "content"
    BETWEEN = "where a call may begin"
    CALL = "in a call"
    BROKEN = "in the arguments of a call, which are not valid JSON"
    BEHIND = "after a call, before its end marker"


class ToolParser(ABC):
    """Splits one answer into content and tool calls."""

    place = Place.CONTENT

    def __init__(self, new_id: Callable[[], str] = new_call_id) -> None:
        self._new_id = new_id
        self._text = ""  # not processed yet
        self._space = ""  # whitespace after the content: not sent until it is known that no call follows
        self._follows_call = False  # whether only whitespace has come since the last call
        self._raw = ""  # the text so far of a call that is not certain yet
        self._call = CallScanner()
        self._content: list[str] = []  # found in this ``feed`` or ``finish``
        self._calls: dict[int, ToolCallDelta] = {}  # the same
        self.num_calls = 0

    def feed(self, text: str) -> Delta:
        """What is certain after ``text``, the next piece of the output."""
        self._text += text
        return self._run(is_last=False)

    def finish(self, text: str = "") -> Delta:
        """The rest, at the end of the output, after its last piece. Call it once."""
        self._text += text
        delta = self._run(is_last=True)
        return delta if self._follows_call else delta._replace(content=delta.content + self._space)

    def _run(self, is_last: bool) -> Delta:
        self._content, self._calls = [], {}
        while self._advance(is_last):
            pass
        return Delta("".join(self._content), tuple(self._calls.values()))

    def _advance(self, is_last: bool) -> bool:
        """Process some of ``_text``. Returns False if it needs more of the output first.

        ``is_last``: the output is complete, so all of it is processed.
        """
        if self.place is Place.CALL:
            return self._read_call(is_last)
        return self._read_others(is_last)

    @abstractmethod
    def _read_others(self, is_last: bool) -> bool:
        """``_advance`` outside of calls."""

    @abstractmethod
    def _give_up(self) -> None:
        """Make content of what was read since a call seemed to begin."""

    def _begin_call(self, raw: str) -> None:
        """Start to read a possible call, of which ``raw`` was read already."""
        self.place, self._raw, self._call = Place.CALL, raw, CallScanner()

    def _read_call(self, is_last: bool) -> bool:
        call, was_certain, number = self._call, self._call.is_certain, 0
        is_refused = False
        for char in self._text:
            if not call.feed(char):
                is_refused = True
                break
            number += 1
            if call.is_complete:
                break
        self._raw += self._text[:number]
        self._text = self._text[number:]
        if call.is_certain:
            if not was_certain:
                self._send(ToolCallDelta(self.num_calls, self._new_id(), call.name))
                self.num_calls += 1
                self._space, self._follows_call = "", True
            self._raw = ""
            self._send(ToolCallDelta(self.num_calls - 1, arguments=call.take_arguments()))
        if call.is_complete or is_refused or is_last:
            if not call.is_certain:
                self._give_up()
            elif is_refused and not call.has_all_arguments:
                self.place = Place.BROKEN
            else:
                self.place = Place.BEHIND
            return True
        return False

    def _send(self, new: ToolCallDelta) -> None:
        sent = self._calls.get(new.index)
        if sent is not None:
            new = replace(sent, arguments=sent.arguments + new.arguments)
        if new.id or new.arguments:
            self._calls[new.index] = new

    def _send_content(self, text: str) -> None:
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._content.append(shown)
            self._follows_call = False


class HermesParser(ToolParser):
    """Calls between ``<tool_call>`` and ``</tool_call>``, each an object with "name" and "arguments". Qwen's, too."""

    START, END = "<tool_call>", "</tool_call>"

    def _give_up(self) -> None:
        self.place, self._text = Place.CONTENT, self._raw[len(self.START) :] + self._text
        self._send_content(self.START)

    def _read_others(self, is_last: bool) -> bool:
        if self.place is Place.CONTENT:
            before, start = self._until(is_last, self.START)
            self._send_content(before)
            if start:
                self._begin_call(start)
            return bool(start)
        markers = (self.END,) if self.place is Place.BROKEN else (self.END, self.START)
        before, found = self._until(is_last, *markers)
        if self.place is Place.BROKEN:
            self._send(ToolCallDelta(self.num_calls - 1, arguments=before))
        if found == self.START:  # its own end marker is missing
            self._begin_call(found)
        elif found:
            self.place = Place.CONTENT
        return bool(found)

    def _until(self, is_last: bool, *markers: str) -> tuple[str, str]:
        """Remove from ``_text`` what comes before the first marker, and the marker. Returns both.

        Without a marker: returns all of it and "", but, unless ``is_last``, keeps an end that may begin a marker.
        """
        text = self._text
        found = [(place, marker) for marker in markers if (place := text.find(marker)) >= 0]
        place, marker = min(found, default=(len(text), ""))
        if not marker and not is_last:
            place -= max(num_held(text, marker) for marker in markers)
        self._text = text[place + len(marker) :]
        return text[:place], marker


class JsonParser(ToolParser):
    """An answer that consists of calls only, each an object with "name" and "parameters" or "arguments".

    Args:
        between: the characters, besides whitespace, that may stand between the calls.
    """

    place = Place.BETWEEN

    def __init__(self, new_id: Callable[[], str] = new_call_id, between: str = ";") -> None:
        super().__init__(new_id)
        self._between = SPACE + between

    def _give_up(self) -> None:
        self.place, self._text = Place.CONTENT, self._raw + self._text

    def _read_others(self, is_last: bool) -> bool:
        if self.place is Place.BEHIND:
            self.place, self._raw = Place.BETWEEN, ""
        if self.place is Place.BETWEEN:
            rest = self._text.lstrip(self._between)
            self._raw += self._text[: len(self._text) - len(rest)]
            self._text = rest
            if rest.startswith("{"):
                self._begin_call(self._raw)
                return True
            if not rest and not (is_last and not self.num_calls):
                return False
            self._give_up()
        text, self._text = self._text, ""
        if self.place is Place.BROKEN:
            self._send(ToolCallDelta(self.num_calls - 1, arguments=text))
        else:
            self._send_content(text)
        return False


class NamedParser(ToolParser):
    """An answer that consists of the arguments of one call. The request named the function."""

    def __init__(self, name: str, new_id: Callable[[], str] = new_call_id) -> None:
        super().__init__(new_id)
        self._name = name

    def _give_up(self) -> None:
        raise NotImplementedError("all text belongs to the call")

    def _read_others(self, is_last: bool) -> bool:
        text, self._text = self._text, ""
        if text and not self.num_calls:
            self._send(ToolCallDelta(0, self._new_id(), self._name))
            self.num_calls = 1
        self._send(ToolCallDelta(0, arguments=text))
        return False


def num_held(text: str, marker: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``marker``."""
    most = min(len(text), len(marker) - 1)
    return next((n for n in range(most, 0, -1) if marker.startswith(text[-n:])), 0)


TOOL_PARSERS: dict[str, Callable[[], ToolParser]] = {"hermes": HermesParser, "llama3_json": JsonParser}
"""vLLM's names."""
