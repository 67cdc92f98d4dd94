"""``tools`` and ``tool_choice``: the functions that an answer may call, and how calls are found in its text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from paged_infer.params import StructuredOutputsParams
from paged_infer.server.openai.base_model import StrictModel
from paged_infer.server.openai.errors import APIError
from paged_infer.text.tool_parsers import TOOL_PARSERS, JsonParser, NamedParser, ToolParser

MAX_DEPTH = 64  # levels of the schema of a tool's parameters
_OF_SCHEMAS = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")  # name -> schema
_COMPOSED = {"$ref", "anyOf", "oneOf", "allOf"}
_OF_VALUES = ("enum", "const", "default", "examples")


class Function(StrictModel):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="The JSON schema of its arguments, an object.")
    strict: bool | None = Field(None, description="No effect: `required` and named calls always follow the schema.")


class Tool(StrictModel):
    type: Literal["function"]
    function: Function

    def as_dict(self) -> dict[str, Any]:
        """The form that chat templates take."""
        members = {name: getattr(self.function, name) for name in Function.model_fields}
        return {"type": "function", "function": {name: value for name, value in members.items() if value is not None}}


class FunctionName(StrictModel):
    name: str


class NamedToolChoice(StrictModel):
    type: Literal["function"] = "function"
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


def checked_choice(tools: list[Tool], choice: ToolChoice | None) -> ToolChoice:
    """``tool_choice`` with its default. Raises APIError 400 if it does not fit the tools."""
    names = [tool.function.name for tool in tools]
    if not tools:
        if choice in (None, "none"):
            return "none"
        raise APIError(400, f"tool_choice={_shown(choice)}: needs tools", param="tool_choice")
    known = set[str]()
    for place, name in enumerate(names):
        if not name or name in known:
            raise APIError(400, f"tools[{place}]: the name {name!r} must be unique and not empty", param="tools")
        known.add(name)
        if _is_deeper(tools[place].function.parameters, MAX_DEPTH):
            message = f"tools[{place}].function.parameters: nested deeper than {MAX_DEPTH} levels"
            raise APIError(400, message, param="tools")
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        message = f"tool_choice={_shown(choice)}: must be one of the tools: {', '.join(names)}"
        raise APIError(400, message, param="tool_choice")
    return choice or "auto"


def _is_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        inner = [one for one in level if isinstance(one, (list, dict))]
        level = [member for one in inner for member in (one.values() if isinstance(one, dict) else one)]
    return bool(level)


def tool_grammar(tools: list[Tool], choice: ToolChoice, parallel: bool) -> StructuredOutputsParams | None:
    """The grammar that enforces the choice: the arguments of the named tool, or a list of calls, as in vLLM.

    Raises:
        ValueError: a tool that may be called has parameters that are not an object.
    """
    if isinstance(choice, NamedToolChoice):
        place, tool = next((i, tool) for i, tool in enumerate(tools) if tool.function.name == choice.function.name)
        return StructuredOutputsParams(json=_parameters(tool, place))
    if choice != "required":
        return None
    calls = []
    for place, tool in enumerate(tools):
        schema = moved(_parameters(tool, place), f"#/items/anyOf/{place}/properties/parameters")
        properties = {"name": {"const": tool.function.name}, "parameters": schema}
        calls.append(
            {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        )
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1}
    return StructuredOutputsParams(json=schema if parallel else {**schema, "maxItems": 1})


def _parameters(tool: Tool, place: int) -> dict[str, Any]:
    """The schema of its arguments, which has to say that they are an object: a call with others would be none."""
    schema = tool.function.parameters or {"properties": {}}
    if _COMPOSED.isdisjoint(schema):
        schema = {"type": "object", **schema}
    if not _is_object(schema, schema, set()):
        found = f": type={schema['type']!r}" if "type" in schema else ""
        raise ValueError(f"tools[{place}].function.parameters{found}: must be 'object'")
    return schema


def _is_object(schema: Any, root: dict[str, Any], followed: set[str]) -> bool:
    """Whether all values of the schema are objects."""
    if not isinstance(schema, dict):
        return False
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in followed:
            return True  # as far as what it was followed to
        followed.add(reference)
        if len(followed) > MAX_DEPTH:
            return False
        target: Any = root
        for part in reference.split("/")[1:]:
            target = target.get(part) if isinstance(target, dict) else None
        return _is_object(target, root, followed)
    for keyword, of_all in (("anyOf", all), ("oneOf", all), ("allOf", any)):
        if isinstance(schema.get(keyword), list):
            return of_all(_is_object(one, root, followed) for one in schema[keyword])
    return schema.get("type") == "object"


def moved(schema: Any, root: str) -> Any:
    """The schema, with its references to itself adapted to its new location ``root`` in another schema."""
    if isinstance(schema, list):
        return [moved(one, root) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    found: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword == "$ref" and isinstance(value, str) and value.startswith("#"):
            found[keyword] = root + value[1:]
        elif keyword in _OF_SCHEMAS and isinstance(value, Mapping):
            found[keyword] = {name: moved(one, root) for name, one in value.items()}
        else:
            found[keyword] = value if keyword in _OF_VALUES else moved(value, root)
    return found


def in_terms_of_tools(message: str) -> str:
    """A message about the schema of a list of calls, with locations in the request's ``tools``."""
    return re.sub(r"#/items/anyOf/(\d+)/properties/parameters", r"tools[\1].function.parameters", message)


def tool_parser(choice: ToolChoice, name: str | None) -> ToolParser | None:
    """The parser of an answer. None: no calls are looked for.

    Args:
        name: the server's ``tool_call_parser``, for "auto".
    """
    if choice == "none":
        return None
    if choice == "required":
        return JsonParser(between="[,]")
    if isinstance(choice, NamedToolChoice):
        return NamedParser(choice.function.name)
    if name is None:
        message = 'tool_choice="auto": the server needs --enable-auto-tool-choice and --tool-call-parser'
        raise APIError(400, message, param="tool_choice")
    return TOOL_PARSERS[name]()


def _shown(choice: ToolChoice | None) -> str:
    return repr(choice.function.name if isinstance(choice, NamedToolChoice) else choice)
