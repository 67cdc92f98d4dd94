"""Responses that end when their client disconnects, and the engine's streams that they read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from collections.abc import Sequence as ReadOnlyList
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from paged_infer.async_llm import RequestStream
from paged_infer.outputs import RequestOutput

T = TypeVar("T")


def close_all(streams: ReadOnlyList[RequestStream]) -> None:
    for stream in streams:
        stream.close()


async def merged(streams: ReadOnlyList[RequestStream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """(index of the stream, output), as they come."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue(1)

    async def forward(index: int, stream: RequestStream) -> None:
        try:
            async for output in stream:
                await queue.put((index, output))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))

    tasks = [asyncio.create_task(forward(*pair)) for pair in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``, which is cancelled when the client goes away before: then None."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_until_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await _end(task, gone)


class EventStream(Response):
    """Server-sent events, from bytes. Stops reading them as soon as the client has gone, and closes ``streams``."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], streams: ReadOnlyList[RequestStream] = ()) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task, gone = asyncio.create_task(self._send(send)), asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            close_all(self._streams)
            await _end(task, gone)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
