"""A channel from an engine to a reader in an event loop, which holds the latest output of one request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from paged_infer.outputs import RequestOutput


class Loop(Protocol):
    """What is used of an event loop. Other objects stand in for one where no coroutine reads."""

    def call_soon_threadsafe(
        self, callback: Callable[[list[Delivery]], object], deliveries: list[Delivery], /
    ) -> object: ...


@dataclass(slots=True, eq=False)
class OutputChannel:
    """A latest-value channel for the outputs of one request, in its reader's event loop.

    Outputs are cumulative, so a newer one replaces one that has not been read: a slow reader costs no memory.
    """

    loop: Loop | None  # None: it is closed
    latest: RequestOutput | Exception | None = None
    _reader: asyncio.Future[None] | None = None

    def put(self, item: RequestOutput | Exception) -> None:
        self.latest = item
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> RequestOutput:
        """Wait for an output that has not been read, and return it. Raises an exception that was put instead."""
        if self.latest is None:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        item, self.latest, self._reader = self.latest, None, None
        assert item is not None
        if isinstance(item, Exception):
            raise item
        return item


Delivery = tuple[OutputChannel, RequestOutput | Exception]


def put_all(deliveries: Iterable[Delivery]) -> None:
    for channel, item in deliveries:
        channel.put(item)


def deliver(deliveries: Iterable[Delivery]) -> list[Loop]:
    """Deliver by one call to each event loop, of which there is usually one. Returns those that are closed."""
    by_loop: dict[Loop, list[Delivery]] = {}
    for channel, item in deliveries:
        if channel.loop is not None:
            by_loop.setdefault(channel.loop, []).append((channel, item))
    closed = []
    for loop, of_loop in by_loop.items():
        try:
            loop.call_soon_threadsafe(put_all, of_loop)
        except RuntimeError:
            closed.append(loop)
    return closed


class RequestStream:
    """The outputs of one request as an async iterator, for one reader. ``close`` aborts an unfinished request.

    Args:
        on_end: called once with the stream, and whether the request has ended.
    """

    def __init__(
        self, request_id: str, channel: OutputChannel, on_end: Callable[[RequestStream, bool], object]
    ) -> None:
        self.request_id = request_id
        self._channel, self._on_end = channel, on_end
        self._is_over = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._is_over:
            raise StopAsyncIteration
        try:
            output = await self._channel.get()
        except asyncio.CancelledError:
            raise
        except Exception:
            self._end(has_ended=True)
            raise
        if output.finished:
            self._end(has_ended=True)
        return output

    def close(self) -> None:
        if not self._is_over:
            self._end(has_ended=False)

    def _end(self, has_ended: bool) -> None:
        self._is_over = True
        self._on_end(self, has_ended)
