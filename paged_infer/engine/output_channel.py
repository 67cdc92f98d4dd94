"""A channel from the engine's thread to a reader in an event loop, which holds the latest output of one request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from paged_infer.outputs import RequestOutput


@dataclass(slots=True, eq=False)
class OutputChannel:
    """A latest-value channel for the outputs of one request, in its reader's event loop.

    Outputs are cumulative, so a newer one replaces one that has not been read: a slow reader costs no memory.
    """

    loop: asyncio.AbstractEventLoop
    latest: RequestOutput | Exception | None = None
    _reader: asyncio.Future[None] | None = None

    def put(self, item: RequestOutput | Exception) -> None:
        self.latest = item
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> RequestOutput:
        """Wait for an output that has not been read, and return it. Raises an exception that was put instead."""
        if self.latest is None:
            self._reader = self.loop.create_future()
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


def deliver(deliveries: Iterable[Delivery]) -> list[asyncio.AbstractEventLoop]:
    """Deliver by one call to each event loop, of which there is usually one. Returns those that are closed."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
    for delivery in deliveries:
        by_loop.setdefault(delivery[0].loop, []).append(delivery)
    closed = []
    for loop, of_loop in by_loop.items():
        try:
            loop.call_soon_threadsafe(put_all, of_loop)
        except RuntimeError:
            closed.append(loop)
    return closed
