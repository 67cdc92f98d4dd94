"""The arguments of a call that a request requires are an object, whatever a tool's parameters leave open."""

from __future__ import annotations

import json
from typing import Any

import pytest

from paged_infer.server.openai.tools import Function, FunctionName, NamedToolChoice, Tool, tool_grammar

NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
CHOICE = NamedToolChoice(function=FunctionName(name="f"))


def grammar(parameters: dict[str, Any] | None) -> Any:
    tool = Tool(type="function", function=Function(name="f", parameters=parameters))
    found = tool_grammar([tool], CHOICE, True)
    assert found is not None
    return json.loads(str(found.json))


@pytest.mark.parametrize("parameters", [None, {}, {"description": "?"}, {"minLength": 3}, {"properties": {"a": {}}}])
def test_parameters_without_a_type_are_of_an_object(parameters: dict[str, Any] | None) -> None:
    assert grammar(parameters) == {"type": "object", **(parameters or {"properties": {}})}


@pytest.mark.parametrize(
    "parameters",
    [
        {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
        {"anyOf": [NODE, {"$ref": "#/$defs/node"}], "$defs": {"node": NODE}},
        {"allOf": [{}, NODE]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, NODE]}}},
    ],
    ids=str,
)
def test_composed_parameters_that_are_objects_stay_as_they_are(parameters: dict[str, Any]) -> None:
    assert grammar(parameters) == parameters


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "string"},
        {"anyOf": [NODE, {"type": "null"}]},
        {"oneOf": []} | {"$ref": "#/$defs/x"},
        {"$ref": "#/$defs/a0", "$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(2000)}},
    ],
    ids=["type", "null", "nowhere", "chain"],
)
def test_parameters_that_may_be_something_else_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"tools\[0\].function.parameters.*: must be 'object'"):
        grammar(parameters)
