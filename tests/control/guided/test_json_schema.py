"""Random walks through the grammar of a schema give valid documents only; what is not supported is refused by name."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from effort import EFFORT
from random_schemas import random_schema, walk

from paged_infer.control.guided.grammar import NativeGrammar, num_allowed
from paged_infer.control.guided.json_keywords import UnsupportedError
from paged_infer.control.guided.vocabulary import Vocabulary

PIECES = ['{"', '":', '": "', '", "', '"}', "],", "true", "null", "12", "0.", "-1", " a", "ab", "abc", "é", "中", "\\n"]
TOKENS = [None, *(bytes([byte]) for byte in range(256)), *(piece.encode() for piece in PIECES), b"\xe4\xb8", b"\xad "]
VOCABULARY = Vocabulary(TOKENS, [0], len(TOKENS))
CLOSING = {i for i, text in enumerate(TOKENS) if text in (b'"', b"}", b"]", b'"}')}


def grammar_of(schema: Any) -> NativeGrammar:
    return NativeGrammar("json", json.dumps(schema), VOCABULARY)


def accepts(schema: Any, text: str) -> bool:
    """Whether the whole text, and no more than it, is a document of the grammar."""
    matcher, token_ids = grammar_of(schema).matcher(), VOCABULARY.split(text.encode())
    if num_allowed(matcher, token_ids) < len(token_ids):
        return False
    return all(map(matcher.accept, [*token_ids, 0]))


def test_random_schemas_give_only_documents_that_jsonschema_validates() -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    num_documents = num_refused = 0
    for seed in range(150 if EFFORT == 1 else 1000):
        schema = random_schema(seed)
        try:
            grammar = grammar_of(schema)
        except ValueError:
            num_refused += 1
            continue
        validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
        for attempt in range(1 if EFFORT == 1 else 3):
            token_ids = walk(grammar, attempt, 0, CLOSING)
            if token_ids is not None:
                document = json.loads(b"".join(TOKENS[i] or b"" for i in token_ids))
                assert validator.is_valid(document), (schema, document)
                num_documents += 1
    assert num_documents > 5 * num_refused


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"type": "integer", "minimum": -3, "maximum": 12}, "-3 0 9 12", "-4 13 -0 01 1.0 1e1"),
        ({"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 101}, "10 99 100", "9 101 1000"),
        ({"type": "number", "minimum": 0.5, "exclusiveMaximum": 2}, "0.5 0.51 1 1.999", "0.49 0 2 2.0 -1"),
        ({"type": "number", "exclusiveMinimum": -1.25, "maximum": -0.5}, "-1.249 -1 -0.5", "-1.25 -0.49 0 -2"),
        ({"type": "number", "maximum": -100}, "-100 -100.5 -2000", "-99 100 0"),
        ({"type": "string", "minLength": 2, "maxLength": 3}, '"ab" "é中a" "\\n\\""', '"a" "abcd" ab'),
        ({"type": "string", "pattern": "b+$", "maxLength": 3}, '"b" "abb"', '"ba" "aaab"'),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, "[1] [1,2]", "[] [1,2,3] [a]"),
        ({"type": "array", "prefixItems": [{"const": 1}], "items": False}, "[] [1]", "[2] [1,1]"),
        ({"properties": {"a": {}, "b": {}}, "required": ["b"]}, '{"b":1} {"a":1,"b":[{}]}', '{} {"a":1} {"b":1,"a":1}'),
        (
            {"properties": {"a": {"const": 1}}, "additionalProperties": {"const": 2}},
            '{"a":1,"b":2} {"aa":2} {"":2}',
            '{"a":2}',
        ),
        ({"type": "object", "required": ["z"]}, '{"z":0} {"z":1,"y":2}', '{} {"y":1}'),
        ({"type": ["null", "boolean"]}, "null true false", "0 nul"),
        ({"type": "integer", "enum": ["a", 1, 2.0, 2.5]}, "1 2.0", '"a" 2.5'),
        ({"anyOf": [{"const": "a"}, {"const": "ab"}, False]}, '"a" "ab"', '"b"'),
        ({"allOf": [{"type": "null"}]}, "null", "1"),
        (True, '{} [] "" 0 null {"a":[{"b":1}]}', "{1} nan"),
    ],
    ids=str,
)
def test_a_schema_admits(schema: Any, valid: str, invalid: str) -> None:
    for text in valid.split():
        assert accepts(schema, text), text
    for text in invalid.split():
        assert not accepts(schema, text), text


TREE = {"$ref": "#/$defs/t", "$defs": {"t": {"properties": {"v": {"type": "integer"}, "k": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "required": ["v"], "additionalProperties": False}}}  # fmt: skip  # noqa: E501


def test_brackets_of_recursive_schemas_match_and_nest_to_a_bound() -> None:
    def nested(depth: int) -> str:
        return '{"v":1,"k":[' * depth + '{"v":1}' + "]}" * depth

    assert accepts(TREE, nested(0)) and accepts(TREE, nested(3)) and accepts(TREE, nested(20))
    assert not accepts(TREE, nested(3)[:-1]) and not accepts(TREE, nested(100))
    matcher = grammar_of(TREE).matcher()
    token_ids = VOCABULARY.split(nested(100).encode())
    for token_id in token_ids[: num_allowed(matcher, token_ids)]:
        matcher.accept(token_id)
    assert any(matcher.mask())  # it is as deep as may be, and not at a dead end


def test_whitespace_is_at_most_one_space_after_a_comma_or_colon() -> None:
    schema = {"properties": {"a": {"type": "array"}, "b": {}}, "required": ["a"]}
    assert accepts(schema, '{"a":[1,2],"b":0}') and accepts(schema, '{"a": [1, 2], "b": 0}')
    for text in ('{"a":  1}', ' {"a":[]}', '{ "a":[]}', '{"a":[] }', '{"a" :[]}', '{"a":[1 ,2]}', '{"a":\n[]}'):
        assert not accepts(schema, text), text


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "integer", "multipleOf": 3}, "#: keyword 'multipleOf' is not supported; known: type"),
        ({"properties": {"a": {"oneOf": []}}}, "#/properties/a: keyword 'oneOf'"),
        ({"items": {"not": {}}}, "#/items: keyword 'not'"),
        ({"patternProperties": {}}, "keyword 'patternProperties'"),
        ({"uniqueItems": True}, "keyword 'uniqueItems'"),
        ({"anyOf": [{}], "type": "string"}, "keyword 'type' together with 'anyOf'"),
        ({"enum": [1], "minimum": 0}, "keyword 'minimum' together with 'enum'"),
        ({"allOf": [{}, {}]}, "allOf of 2 schemas"),
        ({"$ref": "other.json"}, 'only #/... in this schema'),
        ({"$ref": "#/$defs/x"}, "cannot be resolved: there is no '$defs'"),
        ({"$ref": "#"}, "leads back to itself"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "leads back to itself"),
        ({"type": "string", "format": "hostname"}, 'format "hostname" is not supported; known: date'),
        ({"type": "string", "format": "date", "pattern": "1"}, "format together with pattern"),
        ({"type": "string", "pattern": "(?=a)"}, "lookahead"),
        ({"type": "string", "maxLength": 100_000}, "maxLength=100000: it needs more than 4096 states"),
        ({"type": "array", "minItems": 100_000}, "more than 60000 states"),
        ({"type": "text"}, 'type="text": must be one of object'),
        ({"type": []}, "type is an empty list"),
        ({"enum": []}, "enum=[] must be a list that is not empty"),
        ({"enum": ["a"], "type": "integer"}, 'no value of ["a"] is of type "integer"'),
        ({"minLength": 3, "maxLength": 2, "type": "string"}, "nothing satisfies minLength=3 and maxLength=2"),
        ({"minItems": "1"}, 'minItems="1" must be an integer >= 0'),
        ({"minimum": "1"}, 'minimum="1" must be a finite number'),
        ({"type": "integer", "minimum": 2.2, "maximum": 2.8}, "nothing satisfies it"),
        ({"type": "string", "pattern": "^a$", "minLength": 2}, "nothing satisfies it"),
        ({"properties": {"a": False}, "required": ["a"]}, "nothing satisfies it"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "nothing satisfies it"),
        ({"properties": {}, "required": ["a"], "additionalProperties": False}, "required \"a\""),
        ({"properties": []}, "properties=[] must be an object"),
        ({"required": "a"}, 'required="a" must be a list of strings'),
        ({"items": 3}, "#/items: 3 is not a schema"),
        (False, "nothing satisfies it"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_unsupported_broken_or_unsatisfiable_is_refused_by_name(schema: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason.replace('required "a"', "required 'a'"))):
        grammar_of(schema)


def test_a_schema_nested_without_end_is_refused() -> None:
    schema: Any = {}
    for _ in range(3000):
        schema = {"items": schema}
    with pytest.raises(ValueError, match=r"nested (too deep|more than 64 levels deep)"):
        from paged_infer.control.guided.json_schema import json_network

        json_network(schema)


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"type": "number", "minimum": -0.0}, "0 5 0.5 12", "-1 -0.5"),
        ({"type": "number", "maximum": -0.0}, "0 -5 -0.5", "1 0.5"),
        ({"type": "integer", "minimum": -0.0, "maximum": -0.0}, "0", "-1 1"),
        ({"type": "number", "minimum": -1e308, "maximum": 1e308}, "0 -1.5 100000", "1e5"),
        ({"type": "integer", "minimum": 10**17, "maximum": 10**17}, str(10**17), f"{10**17 + 1} {10**17 - 1}"),
        ({"anyOf": [{"const": 1}, {"type": "integer", "enum": [2, "a"]}, {"const": 3}]}, "1 2 3", '"a" 4'),
        ({"$ref": "#/$defs/a%20%25b", "$defs": {"a %b": {"type": "null"}}}, "null", "1"),
        ({"type": ["null", "null", "boolean"]}, "null true", "0"),
    ],
    ids=str,
)
def test_odd_bounds_and_references_admit_what_they_say(schema: Any, valid: str, invalid: str) -> None:
    test_a_schema_admits(schema, valid, invalid)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number", "minimum": 1e20},
        {"type": "integer", "minimum": 1e308},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1e-16},
        {"type": ["string", "number"], "minimum": 1e20},
        {"type": "number", "minimum": 0.12345678901234568, "maximum": 0.12345678901234568},
    ],
    ids=str,
)
def test_numbers_with_more_digits_than_are_written_are_unsupported_not_unsatisfiable(schema: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"#: no number of at most (15|18) digits and without an exponent"):
        grammar_of(schema)
