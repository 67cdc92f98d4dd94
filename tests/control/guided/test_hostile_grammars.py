"""Grammars that a hostile client may send: bounded in time and memory, and never a smaller language without a word."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from paged_infer.control.guided import automaton, machine, vocabulary
from paged_infer.control.guided.grammar import GrammarError, NativeGrammar, num_allowed
from paged_infer.control.guided.json_keywords import UnsupportedError
from paged_infer.control.guided.machine import Machine, State
from paged_infer.control.guided.regex import regex_dfa
from paged_infer.control.guided.vocabulary import Vocabulary, allowed_ids

EOS = 0
BYTES = Vocabulary([None, *(bytes([byte]) for byte in range(256))], [EOS], 257)
PIECES = [None, *(bytes([byte]) for byte in range(256)), b'{"', b'":', b'["', b'",', b"]]", b"[[", b'"]', b'"}']
WORDS = Vocabulary(PIECES, [EOS], len(PIECES))


def accepts(grammar: NativeGrammar, text: str) -> bool:
    token_ids = [*(byte + 1 for byte in text.encode()), EOS]
    return num_allowed(grammar.matcher(), token_ids) == len(token_ids)


def schema(schema: Any, words: Vocabulary = BYTES) -> NativeGrammar:
    return NativeGrammar("json", json.dumps(schema), words)


def reached(found: Machine) -> set[State]:
    """The states that the first one leads to."""
    seen, waiting = {found.start}, [found.start]
    while waiting:
        for after in waiting.pop().successors or ():
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
    return seen


def test_forgotten_states_are_kept_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MAX_KEPT_STATES", 300)
    grammar = schema(True, WORDS)
    numbers = []
    for seed in range(6):
        rng, matcher = random.Random(seed), grammar.matcher()
        for _ in range(60):
            matcher.accept(rng.choice(allowed_ids(matcher.mask())[1:] or [EOS]))
        del matcher
        numbers.append(len(reached(grammar.machine)))
    num_classes = len({*grammar.machine.class_of})
    assert max(numbers) <= 300 + num_classes, numbers


def test_many_alternatives_are_all_there() -> None:
    names = [f"p{i}" for i in range(300)]
    properties = schema({"properties": {name: {"type": "null"} for name in names}, "additionalProperties": False})
    assert accepts(properties, "{}") and all(accepts(properties, json.dumps({name: None})) for name in names)
    values = schema({"anyOf": [{"const": name} for name in names] + [{"enum": [1, "a"]}, {"type": "null"}]})
    assert all(accepts(values, json.dumps(value)) for value in [*names, 1, "a", None]) and not accepts(values, '"p"')
    objects = schema({"anyOf": [{"properties": {"k": {"const": n}}, "required": ["k"]} for n in names]})
    assert all(accepts(objects, json.dumps({"k": name})) for name in names)


def test_too_many_alternatives_are_refused_or_end_their_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the beginning are known when the grammar is compiled."""
    monkeypatch.setattr(machine, "MAX_CONFIGURATIONS", 50)
    many = {"anyOf": [{"type": "string"}] * 80}
    with pytest.raises(UnsupportedError, match="it has more than 50 alternatives at once"):
        schema(many)
    matcher = schema({"prefixItems": [many]}).matcher()
    with pytest.raises(GrammarError, match="more than 50 alternatives"):
        matcher.accept(ord("[") + 1)
    assert num_allowed(matcher, [ord("[") + 1]) == 0


ALIKE = [{"type": "array", "items": {"$ref": "#/$defs/t"}}] * 3
AMBIGUOUS = {"$ref": "#/$defs/t", "$defs": {"t": {"anyOf": [*ALIKE, {"type": "null"}]}}}


def test_an_ambiguous_grammar_is_followed_to_a_bound_which_does_not_depend_on_what_came_before() -> None:
    def masks(grammar: NativeGrammar, text: bytes) -> list[bytes]:
        matcher, found = grammar.matcher(), []
        for token_id in WORDS.split(text):
            found.append(matcher.mask())
            assert matcher.accept(token_id)
        return [*found, matcher.mask()]

    text = b"[[[[[[[[null,null],[[null]]]]]]]]]"
    expected = masks(schema(AMBIGUOUS, WORDS), text)
    grammar = schema(AMBIGUOUS, WORDS)
    for other in (b"[[[[[[null,[[[", b"[null,[null,[[[[[", b"[[[[[[[[[[[["):
        masks(grammar, other)
    assert masks(grammar, text) == expected
    assert all(len(one.configurations) < 2000 for one in reached(grammar.machine))
    deep = "[" * 12 + "null" + "]" * 12
    assert accepts(schema(AMBIGUOUS), deep) and not accepts(schema(AMBIGUOUS), deep[:-1])


def test_a_mask_that_would_take_too_long_ends_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "MAX_FOLLOWED", 1)
    with pytest.raises(GrammarError, match="too ambiguous"):
        schema(True, WORDS).matcher().mask()


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("(?:" + "|".join(map(chr, range(0x4E00, 0x5000))) + ")*", ["", "一丁七", "一" * 50]),
        (".{0,900}", ["", "a" * 900]),
        ("[" + "ab\\d" * 5_000 + "c]{300}", ["abc" * 100]),
        ("(?:.*a){40}", ["a" * 40, "ba" * 45]),
    ],
    ids=["alternatives", "optional", "class", "searches"],
)
def test_a_large_pattern_takes_time_in_proportion(pattern: str, texts: list[str]) -> None:
    """The automaton is small, and little is visited for it: MAX_WORK would refuse it otherwise."""
    grammar = NativeGrammar("regex", pattern, BYTES)
    assert all(accepts(grammar, text) for text in texts) and not accepts(grammar, "\n")


@pytest.mark.parametrize(
    ("limit", "value", "pattern", "reason"),
    [
        ("MAX_WORK", 5000, "(?:.*x|.*y|.*z){20}", "its alternatives and repetitions multiply"),
        ("MAX_EDGES", 50, "[b-y]{60}", "it needs more than 50 edges"),
    ],
)
def test_a_pattern_that_multiplies_is_refused(
    limit: str, value: int, pattern: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automaton, limit, value)
    with pytest.raises(ValueError, match=re.escape(reason)):
        regex_dfa(pattern)


def test_references_in_thousands_are_ordered_once_each() -> None:
    layers: dict[str, Any] = {"a0": {"type": "null"}}
    layers |= {f"a{i}": {"$ref": f"#/$defs/a{i - 1}"} for i in range(1, 2000)}
    found = schema({"$defs": layers, "anyOf": [{"$ref": f"#/$defs/{name}"} for name in layers]})
    assert accepts(found, "null")


@pytest.mark.parametrize(
    "what",
    [{"type": "string", "maxLength": 4100}, {"properties": {"x" * 5000: {}}, "additionalProperties": True}],
    ids=["length", "names"],
)
def test_what_is_too_large_here_is_for_a_library(what: Any) -> None:
    with pytest.raises(UnsupportedError, match="it needs more than"):
        schema(what)


def test_masks_need_nothing_that_is_not_compiled_with_the_grammar() -> None:
    """The trie of a large vocabulary takes a second, which the engine's thread does not have."""
    fresh = Vocabulary(PIECES, [EOS], len(PIECES))
    assert not fresh._bytes
    NativeGrammar("regex", "a", fresh)
    assert len(fresh._bytes) == 256 + 8
