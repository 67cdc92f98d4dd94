"""The keywords of JSON schemas that ``json_schema`` supports, and checks of their values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from paged_infer.control.guided.numbers import Bound

ANNOTATIONS = (
    "title description default examples $schema $id $comment deprecated readOnly writeOnly $defs definitions".split()
)
KEYWORDS = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "boolean": (),
    "null": (),
}
SUPPORTED = (
    "type",
    "enum",
    "const",
    "$ref",
    "anyOf",
    "allOf",
    *dict.fromkeys(k for ks in KEYWORDS.values() for k in ks),
)


class UnsupportedError(ValueError):
    """A part of a schema that this compiler does not support, though a library might."""


def types_of(schema: Mapping[str, Any], where: str) -> list[str]:
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    for name in types:
        if not isinstance(name, str) or name not in KEYWORDS:
            raise ValueError(f"{where}: type={shown(name)}: must be one of {', '.join(KEYWORDS)}")
    if not types:
        raise ValueError(f"{where}: type is an empty list")
    return types


def list_of(schema: Mapping[str, Any], keyword: str, where: str) -> list[Any]:
    if not isinstance(schema[keyword], list) or not schema[keyword]:
        raise ValueError(f"{where}: {keyword}={shown(schema[keyword])} must be a list that is not empty")
    return schema[keyword]


def limits(schema: Mapping[str, Any], fewest: str, most: str, where: str) -> tuple[int, int | None]:
    for keyword in (fewest, most):
        value = schema.get(keyword, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{where}: {keyword}={shown(value)} must be an integer >= 0")
    low, high = schema.get(fewest, 0), schema.get(most)
    if high is not None and high < low:
        raise ValueError(f"{where}: nothing satisfies {fewest}={low} and {most}={high}")
    return low, high


def refuse_others(schema: Mapping[str, Any], keyword: str, others: tuple[str, ...], where: str) -> None:
    """Refuse other keywords of the schema that would have to hold together with ``keyword``."""
    for other in schema:
        if other != keyword and other not in ANNOTATIONS and other not in others:
            raise UnsupportedError(f"{where}: keyword {other!r} together with {keyword!r} is not supported")


def bound(schema: Mapping[str, Any], closed: str, opened: str, tighter: Any, where: str) -> Bound | None:
    found = []
    for keyword, is_open in ((closed, False), (opened, True)):
        if keyword in schema:
            value = schema[keyword]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value - value != 0:
                raise ValueError(f"{where}: {keyword}={shown(value)} must be a finite number")
            found.append(Bound(Decimal(str(value)) if value else Decimal(0), is_open))  # -0.0 is 0
    if len(found) == 2 and found[0].value == found[1].value:
        return found[1]
    return tighter(found, key=lambda bound: bound.value) if found else None


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 100 else text[:100] + "..."
