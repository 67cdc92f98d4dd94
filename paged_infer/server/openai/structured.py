"""``structured_outputs`` and ``response_format``: the form of an answer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from paged_infer.params import StructuredOutputsParams
from paged_infer.server.openai.base_model import ListOf, StrictModel
from paged_infer.server.openai.errors import APIError

GRAMMAR_FIELD = "structured_outputs"  # the name in the engine's errors


class StructuredOutputs(StrictModel):
    """vLLM's field: exactly one of json, regex, choice and grammar; see ``paged_infer.StructuredOutputsParams``."""

    json_: dict[str, Any] | bool | str | None = Field(None, alias="json", description="A JSON schema.")
    regex: str | None = None
    choice: ListOf[str] | None = None
    grammar: str | None = Field(None, description="EBNF, as xgrammar (GBNF) or llguidance (Lark) reads it.")

    def params(self) -> StructuredOutputsParams:
        return StructuredOutputsParams(json=self.json_, regex=self.regex, choice=self.choice, grammar=self.grammar)


class JsonSchemaFormat(StrictModel):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="No effect: answers always follow the schema.")


class ResponseFormat(StrictModel):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def params(self) -> StructuredOutputsParams | None:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            verb = "needs" if self.json_schema is None else "excludes"
            message = f"response_format: type={self.type!r} {verb} json_schema"
            raise APIError(400, message, param="response_format")
        if self.type == "text":
            return None
        schema = {"type": "object"} if self.json_schema is None else self.json_schema.schema_
        return StructuredOutputsParams(json=schema)


def renamed(message: str, field: str) -> str:
    """The message of an error about a grammar, with the name of the request's own field."""
    for prefix in (f"{GRAMMAR_FIELD}: json: ", f"{GRAMMAR_FIELD}: "):
        if message.startswith(prefix):
            return f"{field}: {message.removeprefix(prefix)}"
    return message
