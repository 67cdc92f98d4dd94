"""Errors in the form that OpenAI's clients expect: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, get_type_hints

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute

from paged_infer.config import EngineConfig
from paged_infer.suggestions import unknown_names

_KINDS = {
    401: ("authentication_error", "invalid_api_key"),
    404: ("not_found_error", "not_found"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "service_unavailable"),
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response with a status of 400 or more."""

    error: ErrorDetail


class APIError(Exception):
    """An error response. ``param`` names the field of the body that caused it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers
        self.kind, usual = _KINDS.get(status, ("invalid_request_error", None))
        self.code = code or usual

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response in ASCII-only JSON, which can also quote an unpaired surrogate that a client has sent."""
    return Response(json.dumps(content), status, headers, "application/json")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route for the OpenAPI document: these statuses have an ``ErrorBody``."""
    return {status: {"model": ErrorBody} for status in statuses}


def install(app: FastAPI, routes: Iterable[BaseRoute]) -> None:
    """Answer every exception in this form; a field that belongs to another one of ``routes`` is said to."""
    fields = {route.path: _fields_of(route.endpoint) for route in routes if isinstance(route, APIRoute)}
    app.state.places = {**fields, "paged-infer serve": [one.name for one in dataclasses.fields(EngineConfig)]}
    for kind in (APIError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _respond)


async def _respond(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        error = refusal(list(error.errors()), _fields_of(request.scope.get("endpoint")), request.app.state.places)
    elif isinstance(error, HTTPException):
        error = APIError(error.status_code, _unrouted(request, error), headers=dict(error.headers or {}))
    elif not isinstance(error, APIError):
        error = APIError(500, f"internal server error: {type(error).__name__}")
    return error.response()


def _unrouted(request: Request, error: HTTPException) -> str:
    """What starlette says of a path or a method that no route has, with the route that may be meant."""
    path = request.url.path
    if error.status_code == 405:
        return f"{request.method} {path}: this route takes {Headers(error.headers).get('allow', 'another method')}"
    if error.status_code != 404:
        return str(error.detail)
    paths = [one for one in request.app.state.places if one.startswith("/")]
    near = [one for one in paths if len(path) > 4 and (one.endswith(path) or one.startswith(path))]
    near += get_close_matches(path, paths, 1, 0.8)
    return f"there is no route {path:.100}" + (f" (did you mean {near[0]}?)" if near else "; /openapi.json lists them")


def _fields_of(endpoint: Callable[..., Any] | None) -> tuple[str, ...]:
    """The fields of the body that a route takes."""
    return tuple(getattr(get_type_hints(endpoint).get("body"), "model_fields", ())) if endpoint else ()


def refusal(
    problems: list[dict[str, Any]],
    known_fields: Collection[str] = (),
    places: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> APIError:
    """422 for a malformed body; 400 if its only problem is unknown fields.

    Of these, those of ``known_fields`` that may be meant are named, or which of ``places`` they belong to.
    """
    unknown = [".".join(place_of(p)) for p in problems if p["type"] == "extra_forbidden"]
    others = [one for one in problems if one["type"] != "extra_forbidden"]
    first = (others or problems)[0]
    place = place_of(first)
    strays = unknown_names("unknown field:", unknown, known_fields, lists_known=False, places=places) if unknown else ""
    if not others:
        return APIError(400, strays, param=place[0], code="unknown_field")
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return APIError(422, f"the body is not JSON: {reason}", code="json_invalid")
    if isinstance(first.get("input"), bytes):  # not parsed: its content type is not JSON
        return APIError(422, "the body must be JSON, sent with Content-Type: application/json", code="json_invalid")
    message = "; ".join(filter(None, (f"{'.'.join(place) or 'the body'}: {first['msg']}", strays)))
    return APIError(422, message, param=place[0] if place else None, code=first["type"])


def place_of(problem: dict[str, Any]) -> list[str]:
    """The path of a problem in the body: the names of the outer fields, then the field's own."""
    place = [str(part) for part in problem["loc"]]
    return place[1:] if place[:1] in (["body"], ["query"], ["path"]) else place
