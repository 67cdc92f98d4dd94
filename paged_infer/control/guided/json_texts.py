"""The strings and numbers of JSON documents, as automata."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from paged_infer.control.guided.automaton import Automaton
from paged_infer.control.guided.characters import ANY, complement, ranges_of
from paged_infer.control.guided.json_keywords import KEYWORDS, list_of, refuse_others, shown, types_of
from paged_infer.control.guided.numbers import MAX_DIGITS, max_digits
from paged_infer.control.guided.regex import regex_dfa

_MONTHS = r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
FORMATS = {
    "date": rf"^[12]\d{{3}}-{_MONTHS}$",
    "time": rf"^{_TIME}$",
    "date-time": rf"^[12]\d{{3}}-{_MONTHS}T{_TIME}$",
    "uuid": r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
    "ipv4": rf"^{_BYTE}(?:\.{_BYTE}){{3}}$",
    "email": r"^[A-Za-z0-9_]+(?:[.+-][A-Za-z0-9_]+){0,5}@[A-Za-z0-9]+(?:-[A-Za-z0-9]+){0,3}(?:\.[A-Za-z]{2,10}){1,3}$",
}


@functools.cache
def any_number(is_integer: bool) -> Automaton:
    most = max_digits(is_integer)
    return regex_dfa(rf"-?(0|[1-9]\d{{0,{most - 1}}})" + ("" if is_integer else rf"(\.\d{{1,{MAX_DIGITS}}})?"))


def any_text() -> Automaton:
    return Automaton(edges=[[(ANY, 0)]], free=[[]], accepting={0})


def other_texts(names: list[str]) -> Automaton:
    """All strings but these: a trie of the names that any other character leaves."""
    found = any_text()  # its state 0 becomes the trie's root
    found.edges[0] = []
    other, root = found.new_state(), 0
    found.edges[other].append((ANY, other))
    found.accepting = {root, other}
    children: dict[int, dict[int, int]] = {root: {}}
    for name in names:
        state = root
        for character in map(ord, name):
            if character not in children[state]:
                children[state][character] = child = found.new_state()
                children[child] = {}
                found.accepting.add(child)
            state = children[state][character]
        found.accepting.discard(state)
    for state, after in children.items():
        own = ranges_of((character, character) for character in after)
        found.edges[state] = [(((character, character),), child) for character, child in after.items()]
        found.edges[state].append((complement(own), other))
    return found


def is_fixed(schema: Any) -> bool:
    """Whether it names its values, one by one."""
    return isinstance(schema, Mapping) and ("const" in schema or "enum" in schema)


def fixed_texts(schema: Mapping[str, Any], where: str) -> list[bytes]:
    """The values of ``const`` or ``enum`` that are of the schema's type.

    Raises:
        UnsupportedError: there are other keywords.
        ValueError: there is no value.
    """
    keyword = "const" if "const" in schema else "enum"
    refuse_others(schema, keyword, ("type",), where)
    types = types_of(schema, where) if "type" in schema else [*KEYWORDS]
    choices = [schema["const"]] if keyword == "const" else list_of(schema, "enum", where)
    values = [value for value in choices if not value_types(value).isdisjoint(types)]
    if not values:
        raise ValueError(f"{where}: no value of {shown(choices)} is of type {shown(schema['type'])}")
    return [literal(value, where) for value in values]


def literal(value: Any, where: str) -> bytes:
    """A value as ``in_json`` spells it, without spaces."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as error:
        raise ValueError(f"{where}: {shown(value)} is not a JSON value: {error}") from None


def value_types(value: Any) -> set[str]:
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, (int, float)):
        return {"number", "integer"} if value % 1 == 0 else {"number"}
    if value is None:
        return {"null"}
    return {"string"} if isinstance(value, str) else {"array"} if isinstance(value, list) else {"object"}
