"""JsonScanner accepts what json.loads accepts, and stops at the first character that no JSON has there."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from paged_infer.text.json_scanner import JsonScanner, Phase

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def scanned(text: str) -> tuple[int, JsonScanner]:
    """How many characters it took, and the scanner behind them."""
    scanner = JsonScanner()
    return next((n for n, char in enumerate(text) if not scanner.feed(char)), len(text)), scanner


def is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=lambda name: json.loads(""))
    except ValueError:
        return False
    return True


@settings(max_examples=50)
@given(VALUES, st.sampled_from([None, 1]), st.booleans())
def test_what_json_writes_is_read_to_its_end(value, indent, ascii_only: bool) -> None:
    text = json.dumps({"a": value}, indent=indent, ensure_ascii=ascii_only)
    number, scanner = scanned(text)
    assert number == len(text) and scanner.phase is Phase.END and scanner.depth == 0


@settings(max_examples=50)
@given(VALUES, st.data())
def test_a_text_of_a_few_changes_is_json_or_not_as_for_json_loads(value, data) -> None:
    text = list(json.dumps([value]))
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place] = data.draw(st.sampled_from([*'{}[]",:0-.eE+tn\\u ', "\n", ""]))
    changed = "".join(text)
    number, scanner = scanned(changed)
    assert (number == len(changed) and scanner.phase is Phase.END) == is_json(changed)


@settings(max_examples=50)
@given(VALUES, st.sampled_from([*"{}[],:x", "\\"]), st.data())
def test_what_it_refuses_has_no_continuation(value, wrong: str, data) -> None:
    """No character before the one that it stops at can be the first wrong one: its prefixes begin JSON."""
    text = json.dumps({"a": value})
    place = data.draw(st.integers(0, len(text) - 1))
    number, _ = scanned(text[:place] + wrong + text[place:])
    assert number >= place


def test_deep_nesting_takes_no_recursion() -> None:
    number, scanner = scanned("[" * 100_000)
    assert number == scanner.depth == 100_000
