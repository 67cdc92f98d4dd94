"""Bodies in which every field is known and of its type, and whose mistakes are told quickly, however many there are."""

from __future__ import annotations

from collections.abc import Container
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, model_validator

MAX_TOLD = 8  # unknown fields
T = TypeVar("T")


class _FirstOnly(FailFast):
    __hash__ = object.__hash__  # a union of lists has to hash what they are annotated with


ListOf = Annotated[list[T], _FirstOnly()]
"""Of which the first wrong element is told: to tell of each of 300,000 takes seconds, in which nobody is served."""


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    refused_by_name: ClassVar[Container[str]] = ()  # no fields, but known

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, body: Any) -> Any:
        """Drop unknown fields beyond the first few, which are refused: for the same reason."""
        if not isinstance(body, dict):
            return body
        unknown = [n for n in body if n not in cls.model_fields and n not in cls.refused_by_name]
        dropped = set(unknown[MAX_TOLD:])
        return {name: value for name, value in body.items() if name not in dropped} if dropped else body
