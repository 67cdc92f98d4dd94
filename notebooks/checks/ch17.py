"""Checkers of chapter 17, answers with a shape."""

from __future__ import annotations

import json

from . import checker, expect

TOKENS = [None, b"Mi", b"Mia", b" ", b" has", b"M", b"Leo", b"a", b"", b"Miam", b"\xc3", b"\xa9", b"a has"]


@checker
def choice_mask(answer):
    """Choices that begin alike, that are beginnings of others, that go on alike, and two bytes a character."""
    for choices, so_far in (
        ([b"Mia", b"Mia has", b"Leo"], b""),
        ([b"Mia", b"Mia has", b"Leo"], b"Mi"),
        ([b"Mia", b"Mia has", b"Leo"], b"Mia"),
        ([b"Mia", b"Mia has", b"Leo"], b"Mia has"),
        ([b"Mia", b"Lia has"], b"Mi"),
        (["é".encode()], b"\xc3"),
    ):
        asked = f"choices {choices}, after {so_far!r}"
        found = answer(list(choices), so_far, list(TOKENS), 0)
        expect(found is not None, "choice_mask gives None: is the `return` missing?")
        expect(isinstance(found, set), f"{asked}: a set of ids is asked for, not a {type(found).__name__}")
        right = {i for i, text in enumerate(TOKENS) if text and any(c.startswith(so_far + text) for c in choices)}
        right |= {0} if so_far in choices else set()
        if 0 in right - found:
            expect(False, f"{asked}: the text may end here, so eos is allowed")
        if 0 in found - right:
            expect(False, f"{asked}: the text may not end here, and eos is allowed")
        for i in sorted(found - right):
            sentence = "no bytes: a special token is in no choice" if not TOKENS[i] else f"{TOKENS[i]!r} leads nowhere"
            expect(False, f"{asked}: token {i}: {sentence}")
        for i in sorted(right - found):
            expect(False, f"{asked}: token {i}, {TOKENS[i]!r}, is missing: a choice goes on with it")


@checker
def closing(answer):
    """Documents cut after or inside a value."""
    for text in (
        '{"a": [1, "x',
        "[[1, [2",
        '{"a": {"b": true',
        '["a", "b"',
        '{"a": "[{',
        '["]}", {"b": "}',
        r'["say \"hi',
        r'["a path\\"',
        r'["a path\\',
        '{"a": [1, 2], "b": "',
        "[1]",
    ):
        found = answer(text)
        expect(found is not None, "closing gives None: is the `return` missing?")
        expect(isinstance(found, str), f"{text}: a text is asked for, not {found!r}")
        try:
            json.loads(text + found)
            is_json = True
        except ValueError:
            is_json = False
        expect(is_json, f"{text} followed by {found!r} is not JSON")
        right = _closers(text)
        expect(len(found) <= len(right), f"{text}: {right!r} is enough, and yours gives {found!r}")


def _closers(text: str) -> str:
    """The shortest text that makes it JSON: tried, length after length."""
    ends = [""]
    while True:
        for end in ends:
            try:
                json.loads(text + end)
            except ValueError:
                continue
            return end
        ends = [end + more for end in ends for more in '"]}']


@checker
def forced_bytes(answer):
    """A text with one choice in it, an end with a way on, and a state of no way on."""
    dfa = [{97: 1}, {98: 2}, {99: 3, 100: 3}, {101: 4}, {102: 5}, {}, {103: 6, 104: 5}]
    for accepting, state, right in (
        ({5}, 0, b"ab"),
        ({5}, 3, b"ef"),
        ({4, 5}, 3, b"e"),
        ({0, 5}, 0, b""),
        ({5}, 5, b""),
        ({5}, 2, b""),
        ({5}, 6, b""),
    ):
        found = answer([dict(row) for row in dfa], set(accepting), state)
        asked = f"states {dfa}, ends {accepting}, from state {state}"
        expect(found is not None, "forced_bytes gives None: is the `return` missing?")
        expect(isinstance(found, bytes | bytearray), f"{asked}: bytes are asked for, not {found!r}")
        if len(found) > len(right) and found[: len(right)] == right:
            expect(False, f"{asked}: after {right!r} nothing is forced")
        expect(bytes(found) == right, f"{asked}: {right!r}, and yours gives {bytes(found)!r}")


@checker
def Thoughts(answer):
    """Every cut into two and into single characters, of texts with a marker, with parts of one and with none."""
    for text in (
        "so it is</think> nine",
        "a < b and </th",
        "</think>",
        "x</think>y</think>z",
        "<</think>n",
        "</</think>",
    ):
        reasoning, marker, content = text.partition("</think>")
        cuts = [[text[:n], text[n:]] for n in range(len(text) + 1)] + [list(text)]
        for pieces in cuts:
            parser, found, fed = answer(), ["", ""], ""
            for piece in pieces:
                fed += piece
                _add(found, parser.feed(piece), f"feed({piece!r})")
                _certain(found, fed, f"{text!r} in pieces {pieces}, after {fed!r}")
            _add(found, parser.finish(), "finish()")
            asked = f"{text!r} in pieces {pieces}"
            expect(marker != "" or found[1] == "", f"{asked}: there is no marker, and {found[1]!r} became content")
            expect(
                found == [reasoning, content],
                f"{asked}: {reasoning!r} and {content!r}, and yours gives {found[0]!r} and {found[1]!r}",
            )


def _add(found: list[str], delta: object, call: str) -> None:
    is_pair = isinstance(delta, tuple | list) and len(delta) == 2 and all(isinstance(part, str) for part in delta)
    expect(is_pair, f"{call} gives {delta!r}, and a pair of texts is asked for")
    found[0], found[1] = found[0] + delta[0], found[1] + delta[1]  # type: ignore[index]


def _certain(found: list[str], fed: str, asked: str) -> None:
    """All that is certain has come, and nothing else."""
    reasoning, marker, content = fed.partition("</think>")
    if not marker:
        held = next(n for n in range(7, -1, -1) if reasoning.endswith("</think>"[:n]))
        reasoning = reasoning[: len(reasoning) - held]
    expect(len(found[0]) <= len(reasoning), f"{asked}: {found[0]!r} was sent, whose end may be the marker's beginning")
    expect(len(found[0]) >= len(reasoning), f"{asked}: {reasoning!r} is certain, and only {found[0]!r} was sent")
    expect(found[1] == content, f"{asked}: the content is {content!r} so far, and yours gave {found[1]!r}")
