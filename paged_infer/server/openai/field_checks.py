"""Limits and errors of individual fields of a request."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field

from paged_infer.server.openai.errors import APIError

MAX_LOGPROBS = 20


def first_wrong(bias: Any) -> Any:
    """Reduce a dict to its first value that is not a number, if any: pydantic's dicts cannot fail fast."""
    if not isinstance(bias, dict):
        return bias
    wrong = ((key, value) for key, value in bias.items() if type(value) not in (int, float))
    return dict([first]) if (first := next(wrong, None)) else bias


def within(minimum: float | None = None, maximum: float | None = None, **more: Any) -> Any:
    """An optional field, with its limits for the OpenAPI document.

    They are not checked here but in ``SamplingParams``, whose messages name the value and the limit.
    """
    limits = {"minimum": minimum, "maximum": maximum, **more}
    return Field(None, json_schema_extra={name: limit for name, limit in limits.items() if limit is not None})


def check_logprobs(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise APIError(400, f"{name}={value}: must be an integer within [0, {MAX_LOGPROBS}]", param=name)


def bad_value(error: ValueError, prompt_field: str = "prompt", code: str | None = None) -> APIError:
    """A 400 with the engine's message. ``param`` is the field with which the message begins."""
    message = str(error)
    name = message.split("=", 1)[0].split("[", 1)[0].split(":", 1)[0]
    others = ("the prompt", "prompt token", "the chat template", "character ", "this checkpoint has no")
    if message.startswith(others) or re.match(rf"{prompt_field}\b", message):
        name = prompt_field
    return APIError(400, message, param=name if name.isidentifier() else None, code=code)
