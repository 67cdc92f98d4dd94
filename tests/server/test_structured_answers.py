"""``structured_outputs`` and ``response_format``: answers of a given form, on both routes."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel
from serving import CHAT, PROMPT, error_of

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "doors": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["colour", "doors"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "car", "schema": SCHEMA, "strict": True}}
ROUTES = [("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)]


def text_of(choice: dict[str, Any]) -> str:
    return choice["text"] if "text" in choice else choice["message"]["content"]


def answered(served, path: str, body: Any, **more: Any) -> tuple[str, str]:
    """The text and the finish reason of the answer, which is the same when it is streamed."""
    asked = {**body, "max_tokens": 64, "seed": 5, **more}
    response = served.post(path, **asked)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    lines = served.post(path, **asked, stream=True).text.split("\n\n")
    pieces = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    streamed = "".join(piece["text"] if "text" in piece else piece["delta"].get("content", "") for piece in pieces)
    assert (streamed, pieces[-1]["finish_reason"]) == (text_of(choice), choice["finish_reason"])
    return streamed, choice["finish_reason"]


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize(
    "more",
    [
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"response_format": FORMAT},
    ],
)
def test_an_answer_follows_a_json_schema(served, path: str, body: Any, more: Any) -> None:
    text, finish_reason = answered(served, path, body, **more)
    jsonschema.validate(json.loads(text), SCHEMA)
    assert finish_reason == "stop"


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize(
    ("asked", "form"), [({"regex": "[A-C]{3}-[0-9]"}, "[A-C]{3}-[0-9]"), ({"choice": ["yes", "no"]}, "yes|no")]
)
def test_an_answer_matches_a_pattern_or_is_one_of_a_list(served, path: str, body: Any, asked: Any, form: str) -> None:
    assert re.fullmatch(form, answered(served, path, body, structured_outputs=asked)[0])


def test_an_answer_follows_a_grammar(served) -> None:
    pytest.importorskip("xgrammar")
    asked = {"grammar": 'root ::= "a" [bc]* "d"'}
    assert re.fullmatch("a[bc]*d", answered(served, *ROUTES[0], structured_outputs=asked)[0])


def test_an_answer_is_an_object_where_one_is_asked_for(served) -> None:
    (closing,) = served.engine.tokenizer.encode("}")
    more = {"response_format": {"type": "json_object"}, "logit_bias": {str(closing): 100}}
    assert answered(served, *ROUTES[1], **more) == ("{}", "stop")
    texts = [answered(served, *ROUTES[1], **more, max_tokens=4) for more in ({}, {"response_format": {"type": "text"}})]
    assert texts[0] == texts[1]


def test_max_tokens_in_the_middle_of_a_document_is_reported_as_length(served) -> None:
    text, finish_reason = answered(served, *ROUTES[1], response_format=FORMAT, max_tokens=4)
    assert finish_reason == "length" and text.startswith("{") and not text.endswith("}")


class Car(BaseModel):
    colour: Literal["red", "blue"]
    doors: int
    is_old: bool


def test_openais_client_parses_answers_into_a_model(served) -> None:
    client = served.openai().chat.completions
    body: dict[str, Any] = {"model": "storyteller", "messages": CHAT["messages"], "response_format": Car}
    car = client.parse(**body, max_tokens=90).choices[0].message.parsed
    assert isinstance(car, Car)
    with client.stream(**body, max_tokens=90) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Car)
    with pytest.raises(openai.LengthFinishReasonError):
        client.parse(**body, max_tokens=3)


@pytest.mark.parametrize(
    ("more", "param", "reason"),
    [
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of json, regex, choice and grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "not regex, choice"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "regex: "),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "choice=[]"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "is not valid JSON"),
        ({"structured_outputs": {"json": {"type": "strin"}}}, "structured_outputs", 'type="strin"'),
        ({"structured_outputs": {"json": True, "backend": "xgrammar"}}, "structured_outputs", "backend"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag"),
        ({"structured_outputs": {"choice": ["a"]}, "min_tokens": 1}, "min_tokens", "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"]}, "use_beam_search": True}, "structured_outputs", "use_beam_search"),
        ({"structured_outputs": {"choice": ["a"]}, "response_format": FORMAT}, "response_format", "not supported with"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
        ({"response_format": {**FORMAT, "type": "json_object"}}, "response_format", "excludes json_schema"),
    ],
)
def test_an_invalid_grammar_is_a_400_that_names_it(served, more: Any, param: str, reason: str) -> None:
    for path, body in [*ROUTES, ("/generate", PROMPT)]:
        error = error_of(served.post(path, **{**body, **more}), 400)
        assert error["param"] == param and reason in error["message"], error


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "object", "properties": {"a": {"minLength": 3, "maxLength": 2}}}, "minLength=3 and maxLength=2"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "'#/$defs/b' cannot be resolved"),
        ({"type": "object", "required": ["b"], "properties": {}, "additionalProperties": False}, "required 'b'"),
        ({"type": "string", "pattern": "("}, "#: pattern"),
        ({"not": {"type": "string"}}, "#: keyword 'not'"),
        ({"items": {"type": "array", "uniqueItems": True}}, "#/items: keyword 'uniqueItems'"),
    ],
)
def test_an_unsupported_schema_is_refused_with_its_keyword(served, schema: Any, reason: str) -> None:
    for more in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"structured_outputs": {"json": schema}},
    ):
        error = error_of(served.post("/v1/chat/completions", **CHAT, **more), 400)
        assert error["param"] == next(iter(more)) and error["message"].startswith(f"{error['param']}: "), error
        assert reason in error["message"], error


def test_the_engine_keeps_serving_after_a_refused_grammar(served) -> None:
    error_of(served.post("/v1/completions", **PROMPT, structured_outputs={"regex": "a{1000000}"}), 400)
    assert served.complete(**PROMPT)["choices"]
