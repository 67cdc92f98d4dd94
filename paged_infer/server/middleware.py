"""Checks before any route: host, shutdown, API key, and the size and arrival time of the body."""

from __future__ import annotations

import asyncio
import secrets

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paged_infer.server.hosts import is_allowed
from paged_infer.server.openai.errors import APIError
from paged_infer.server.service import CLOSING, Service, closing_error

OPEN_PATHS = ("/", "/health", "/metrics", "/openapi.json")  # need no key: they reveal nothing about requests


class ChecksMiddleware:
    """Plain ASGI: Starlette's ``BaseHTTPMiddleware`` would wrap each stream in one more task."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            await self._head(scope, send)
            return
        headers = dict(scope["headers"])
        refused = self._refusal(scope, headers)
        if refused is not None:
            await refused.response()(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    async def _head(self, scope: Scope, send: Send) -> None:
        """Answer HEAD as GET without the body. A stream is closed when its head has been sent."""
        is_sent = asyncio.Event()

        async def receive() -> Message:
            await is_sent.wait()
            return {"type": "http.disconnect"}

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                is_sent.set()

        await self({**scope, "method": "GET"}, receive, send_head)

    def _limited(self, receive: Receive) -> Receive:
        """``receive`` with limits on the body's size and arrival time. Later messages have none."""
        limit = self._service.settings.max_body_bytes
        due_s = asyncio.get_running_loop().time() + self._service.settings.receive_timeout_s
        num_bytes, is_complete = 0, False

        async def limited() -> Message:
            nonlocal num_bytes, is_complete
            if is_complete:
                return await receive()
            message = await self._in_time(receive, due_s)
            is_complete = not message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                raise HTTPException(413, _too_large(limit))
            return message

        return limited

    async def _in_time(self, receive: Receive, due_s: float) -> Message:
        """Wait for the next part of a body. Shutdown ends the wait."""
        service = self._service
        try:
            async with asyncio.timeout_at(due_s) as timeout:
                service.receiving.add(timeout)
                return await receive()
        except TimeoutError:
            if service.is_closing or service.engine.error is not None:
                raise HTTPException(503, CLOSING, headers={"Connection": "close"}) from None
            message = f"the body did not arrive within receive_timeout_s={service.settings.receive_timeout_s:g}"
            raise HTTPException(408, message, headers={"Connection": "close"}) from None
        finally:
            service.receiving.discard(timeout)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> APIError | None:
        settings = self._service.settings
        host = headers.get(b"host", b"").decode("latin-1")
        if host and not is_allowed(host, settings.allowed_hosts):
            message = f"Host {host!r} is not allowed; see --allowed-hosts"
            return APIError(400, message, code="host_not_allowed")
        if self._service.is_closing and scope["method"] == "POST":
            return closing_error()
        if settings.api_key is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not secrets.compare_digest(key, settings.api_key.encode()):
                message = "an API key is required: send `Authorization: Bearer KEY`"
                return APIError(401, message, headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > settings.max_body_bytes:
            return APIError(413, _too_large(settings.max_body_bytes), headers={"Connection": "close"})
        return None


def _too_large(limit: int) -> str:
    return f"the body is larger than max_body_bytes={limit}"
