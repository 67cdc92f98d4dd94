"""What a request meets before any route: closing time, the key, and the size of its body."""

from __future__ import annotations

import secrets

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paged_infer.server.errors import APIError
from paged_infer.server.service import Service, closing_error

OPEN_PATHS = (
    "/",
    "/health",
    "/metrics",
    "/openapi.json",
)  # need no key: they hold nothing that anybody has asked


class Door:
    """Plain ASGI, so that a stream passes through untouched."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refused = self._refusal(scope, headers)
        if refused is not None:
            await refused.response()(scope, receive, send)
            return
        limit = self._service.settings.max_body_bytes
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                raise HTTPException(413, _too_large(limit))
            return message

        await self._app(scope, counted, send)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> APIError | None:
        settings = self._service.settings
        if self._service.is_closing and scope["method"] == "POST":
            return closing_error()
        if settings.api_key is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not secrets.compare_digest(key, settings.api_key.encode()):
                message = "a key is needed: send it as `Authorization: Bearer KEY`"
                return APIError(401, message, headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > settings.max_body_bytes:
            return APIError(413, _too_large(settings.max_body_bytes), headers={"Connection": "close"})
        return None


def _too_large(limit: int) -> str:
    return f"the body is larger than max_body_bytes={limit}"
