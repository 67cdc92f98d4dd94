"""The base class of request bodies: every field is known and typed, and validation is fast even with many errors.

JSON has only one number type, so ``1.0`` is accepted as an integer.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, ModelWrapValidatorHandler, ValidationError, model_validator

MAX_UNKNOWN_REPORTED = 8  # unknown fields
T = TypeVar("T")


class _FirstOnly(FailFast):
    __hash__ = object.__hash__  # pydantic hashes the annotations of lists in a union


ListOf = Annotated[list[T], _FirstOnly()]
"""Report only the first invalid element; reporting 300,000 would block the event loop for seconds."""


class StrictModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    refused_by_name: ClassVar[Container[str]] = ()  # fields that are known, but not supported

    @model_validator(mode="wrap")
    @classmethod
    def _whole_numbers(cls, body: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Read ``1.0`` as 1, but only if validation fails without it: most bodies have no such number."""
        try:
            return handler(body)
        except ValidationError:
            if not isinstance(body, dict):
                raise
        return handler({name: _whole(value) for name, value in body.items()})

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, body: Any) -> Any:
        """Report only the first few unknown fields, for the same reason: drop the others."""
        if not isinstance(body, dict):
            return body
        unknown = [n for n in body if n not in cls.model_fields and n not in cls.refused_by_name]
        dropped = set(unknown[MAX_UNKNOWN_REPORTED:])
        return {name: value for name, value in body.items() if name not in dropped} if dropped else body


def _whole(value: Any) -> Any:
    """Convert floats without a fraction to integers, also in lists. Float fields accept integers."""
    if isinstance(value, list):
        return [one if type(one) is int else _whole(one) for one in value]
    return int(value) if type(value) is float and value.is_integer() else value
