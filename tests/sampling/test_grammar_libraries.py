"""xgrammar and llguidance behind the interface of control.guided: the same texts, and nothing that they leave out."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest
from effort import EFFORT
from random_schemas import random_schema, walk

from paged_infer.control.guided.grammar import GrammarError, NativeGrammar, num_allowed
from paged_infer.control.guided.vocabulary import Vocabulary, allowed_ids
from paged_infer.engine import grammars
from paged_infer.engine.grammars import GrammarCache
from paged_infer.params import StructuredOutputsParams
from paged_infer.sampling.grammar_libraries import LIBRARIES, Library, Xgrammar

for name in LIBRARIES:
    pytest.importorskip(name)

TOKENS = [None, *(bytes([byte]) for byte in range(256)), b'{"', b'":', b"ab", b'"}', b"\xc3\xa9a", None]
VOCABULARY = Vocabulary(TOKENS, [0, 262], 280)  # more rows of logits than tokens, and two end tokens
CLOSING = {i for i, text in enumerate(TOKENS) if text in (b'"', b"}", b"]", b'"}')}
EBNF = {"xgrammar": 'root ::= "a" root "b" | "é"', "llguidance": 'start: "a" start "b" | "é"'}


@pytest.fixture(scope="module", params=list(LIBRARIES))
def library(request: pytest.FixtureRequest) -> Library:
    return LIBRARIES[request.param](VOCABULARY, 280)


@pytest.mark.parametrize(
    ("kind", "text"), [("regex", "(ab|a)*é?"), ("regex", "[a-c]{2,3}"), ("choice", '["ab", "a", "é\\"q"]')]
)
def test_masks_are_those_of_the_native_grammar(library: Library, kind: str, text: str) -> None:
    native, other = NativeGrammar(kind, text, VOCABULARY), library.compile(kind, text)
    for seed in range(8):
        rng, ours, theirs = random.Random(seed), native.matcher(), other.matcher()
        for _ in range(8):
            allowed = allowed_ids(ours.mask())
            assert allowed_ids(theirs.mask()) == allowed
            assert ours.is_finished == theirs.is_finished
            if ours.is_finished:
                break
            token_id = rng.choice(allowed)
            assert not theirs.accept(261) or 261 in allowed
            if 261 in allowed:
                theirs.rollback(1)
            assert ours.accept(token_id) and theirs.accept(token_id)


def test_going_back_also_over_the_end_leads_to_the_same_masks(library: Library) -> None:
    matcher = library.compile("regex", "ab?").matcher()
    first = matcher.mask()
    assert matcher.accept(98)
    second = matcher.mask()
    assert {0, 99, 262} == set(allowed_ids(second)) and not matcher.is_finished
    assert matcher.accept(262) and matcher.is_finished and not matcher.accept(99)
    matcher.rollback(1)
    assert matcher.mask() == second
    matcher.rollback(1)
    assert matcher.mask() == first and num_allowed(matcher, [98, 99, 5]) == 2 and matcher.mask() == first
    assert not matcher.accept(5) and not matcher.accept(0) and matcher.mask() == first  # a refusal breaks nothing
    assert library.compile("choice", '["abc"]').matcher().forced() == [259, 100]


def test_a_context_free_grammar_closes_in_pairs(library: Library) -> None:
    grammar = library.compile("grammar", EBNF[type(library).__name__.lower()])
    for seed in range(5):
        token_ids = walk(grammar, seed, 0, {196})
        assert token_ids is not None
        text = b"".join(TOKENS[i] or b"" for i in token_ids).decode()
        assert re.fullmatch("a*éb*", text) and text.count("a") == text.count("b")


def test_documents_are_valid_and_have_no_endless_whitespace(library: Library) -> None:
    schema = {"properties": {"a": {"type": "string", "maxLength": 5}, "b": {"enum": [1, "x"]}}, "required": ["a", "b"]}
    schema |= {"type": "object", "additionalProperties": False}
    grammar = library.compile("json", json.dumps(schema))
    for seed in range(5):
        token_ids = walk(grammar, seed, 0, CLOSING)
        assert token_ids is not None and len(token_ids) < 100
        text = b"".join(TOKENS[i] or b"" for i in token_ids).decode(errors="replace")
        document = json.loads(text)  # without control characters, which xgrammar alone would allow
        if "\ufffd" not in text:  # nor surrogates, which it allows
            jsonschema.validate(document, schema)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json", '{"type": "strin"}'),
        ("json", '{"not": {}}'),
        ("json", '{"properties": {"a": {"items": {"not": {"type": "null"}}}}}'),
        ("json", '{"type": "string", "minLength": 3, "maxLength": 2}'),
        ("json", '{"$ref": "#"}'),
        ("regex", "[a"),
        ("grammar", "root = x"),
    ],
)
def test_what_a_library_does_not_know_is_refused_with_its_name(library: Library, kind: str, text: str) -> None:
    with pytest.raises(ValueError, match=type(library).__name__.lower()):
        library.compile(kind, text)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"items": {"type": "string", "pattern": "a", "minLength": 3}}, "minLength beside pattern is not supported"),
        ({"type": "object", "required": ["a"]}, "required 'a', which is none of its properties, is not supported"),
        ({"properties": {"required": {"uniqueItems": True}}}, "keyword 'uniqueItems' is not supported"),
    ],
)
def test_what_xgrammar_would_leave_out_is_refused(schema: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^xgrammar: {reason}$"):
        Xgrammar(VOCABULARY, 280).compile("json", json.dumps(schema))


@pytest.mark.parametrize("name", LIBRARIES)
def test_random_schemas_give_valid_documents_or_are_refused(name: str) -> None:
    """But for what the libraries' formats and classes of characters hold to be valid."""
    library, num_documents, num_refused = LIBRARIES[name](VOCABULARY, 280), 0, 0
    for seed in range(60 if EFFORT == 1 else 1000):
        schema = random_schema(seed)
        words = json.dumps(schema)
        if '"format"' in words or r"\\W" in words or r"\\D" in words:
            continue
        try:
            NativeGrammar(
                "json", words, VOCABULARY
            )  # which refuses what leads back to itself: no validator ends, either
            grammar = library.compile("json", words)
        except ValueError:
            num_refused += 1
            continue
        token_ids = walk(grammar, seed, 0, CLOSING)
        if token_ids is not None:
            document = json.loads(b"".join(TOKENS[i] or b"" for i in token_ids), strict=name != "xgrammar")
            jsonschema.validate(document, schema)
            num_documents += 1
    assert num_documents > 2 * num_refused


class Spelled:
    """A tokenizer as the cache needs one."""

    def vocabulary_bytes(self) -> list[bytes | None]:
        return TOKENS


def chosen(**what: Any) -> str:
    grammar = GrammarCache(Spelled(), 280, [0]).get(StructuredOutputsParams(**what))  # type: ignore[arg-type]
    return type(grammar).__name__


def test_auto_takes_the_native_grammar_and_a_library_where_that_does_not_reach() -> None:
    assert chosen(json={"type": "integer"}) == chosen(regex="a") == chosen(choice=["a"]) == "NativeGrammar"
    assert chosen(json={"type": "integer", "multipleOf": 3}) == "_LlguidanceGrammar"
    assert chosen(json={"type": "integer"}, backend="xgrammar") == "_XgrammarGrammar"
    assert chosen(grammar=EBNF["xgrammar"]) == "_XgrammarGrammar"
    assert chosen(grammar=EBNF["llguidance"]) == "_LlguidanceGrammar"


def test_auto_takes_a_library_for_a_large_vocabulary_and_the_native_one_where_it_refuses(monkeypatch) -> None:
    monkeypatch.setattr(grammars, "MAX_NATIVE_TOKENS", 100)
    assert chosen(json={"type": "integer"}) == "_LlguidanceGrammar"
    assert chosen(json={"type": "integer"}, backend="native") == "NativeGrammar"
    with pytest.raises(ValueError, match="#/items: keyword 'not' is not supported"):
        chosen(json={"items": {"not": {}}})
    monkeypatch.setattr(grammars, "is_installed", lambda name: False)
    assert chosen(json={"type": "integer"}) == "NativeGrammar"


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "is_installed", lambda name: False)
    for what in ({"grammar": EBNF["xgrammar"]}, {"regex": "a", "backend": "llguidance"}, {"json": {"not": {}}}):
        with pytest.raises(ValueError, match=r"(xgrammar|llguidance).*pip install 'paged-infer\[guided\]'"):
            chosen(**what)


class Broken:
    """A library's matcher that has failed inside."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"Check failed: {name}")


def test_whatever_a_library_raises_ends_only_its_request(library: Library) -> None:
    grammar = library.compile("regex", "ab?")
    for use in (
        lambda matcher: matcher.mask(),
        lambda matcher: matcher.accept(98),
        lambda matcher: matcher.rollback(1),
        lambda matcher: matcher.forced(),
        lambda matcher: matcher.is_finished,
    ):
        matcher = grammar.matcher()
        matcher._matcher = Broken()  # type: ignore[attr-defined]
        with pytest.raises(GrammarError, match="its grammar failed: "):
            use(matcher)


def test_a_library_keeps_no_grammars_of_its_own() -> None:
    """``GrammarCache`` decides which are kept; xgrammar's cache would grow with every schema of every client."""
    library = Xgrammar(VOCABULARY, 280)
    for number in range(5):
        library.compile("json", json.dumps({"properties": {f"a{number}": {"type": "integer"}}}))
    assert library.compiler.get_cache_size_bytes() == 0
