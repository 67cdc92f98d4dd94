"""Responses that end when the client disconnects, and the engine's streams that they read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from collections.abc import Sequence as ReadOnlyList
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from paged_infer.async_llm import RequestStream
from paged_infer.outputs import RequestOutput

T = TypeVar("T")


class EventStream(StreamingResponse):
    """Server-sent events. Stops as soon as the client disconnects, and closes ``streams`` in any case.

    Starlette's own ``__call__`` notices a disconnect only at the next event if the server implements ASGI 2.4 or later.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], streams: ReadOnlyList[RequestStream] = ()) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await cancel_on_disconnect(receive, self.stream_response(send))
        finally:
            close_all(self._streams)


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``. If the client disconnects first, ``work`` is cancelled and the result is None."""
    task, disconnect = asyncio.create_task(work), asyncio.create_task(_until_disconnect(receive))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merged(streams: ReadOnlyList[RequestStream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """(index of the stream, output) of all streams, in order of arrival."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    # The queue has room for one item: a slow client delays the streams instead of filling it.
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


def close_all(streams: ReadOnlyList[RequestStream]) -> None:
    for stream in streams:
        stream.close()
