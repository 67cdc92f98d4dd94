"""/events: the state of the pool and the queues as server-sent events: first all of it, then the differences.

    engine's thread    snapshot() between two steps, at most ten times a second, and only while a client is connected
          |
       Snapshot        the newest one, shared by all clients
          |
    event loop         for each client, diff() of the newest snapshot and the last one that it was sent

Only those snapshots are kept, however long a client stays connected.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from paged_infer.async_llm import EngineDeadError
from paged_infer.engine.snapshot import Snapshot, timed_snapshot
from paged_infer.server.openai.errors import APIError
from paged_infer.server.openai.event_stream import EventStream
from paged_infer.server.openai.json_stream import event
from paged_infer.server.service import Service, closing_error, service_of

EVERY_S = 0.1
MOST_OF_ENGINE = 0.05  # largest share of the engine's time for snapshots: those of a large pool are rarer
QUIET_S = 15.0  # then a comment keeps proxies from closing the connection

CLOSING = b"event: closing\ndata: {}\n\n"
router = APIRouter()


def diff(old: Snapshot | None, new: Snapshot) -> dict[str, Any]:
    """What changed from ``old`` to ``new``. A cell is [block, owners, tokens, is_hashed], or [block] if it is blank."""
    known = {} if old is None else old.cells
    held = [list(cell) for block, cell in new.cells.items() if known.get(block) != cell]
    blank = [[block] for block in known if block not in new.cells]
    return {
        "is_whole": old is None,
        "block_size": new.block_size,
        "stats": new.stats,
        **new.queues,
        "cells": held + blank,
    }


class LiveEvents:
    """Takes snapshots of one engine, at most every ``EVERY_S``, and streams their differences.

    One for each replica, in ``app.state.live_events``.
    """

    def __init__(self, service: Service, replica: int = 0) -> None:
        self._service = service
        self._replica = replica
        self._lock = asyncio.Lock()
        self._newest: Snapshot | None = None
        self._next_s = 0.0  # time.monotonic()

    async def newest(self) -> Snapshot:
        async with self._lock:
            if self._newest is not None and time.monotonic() < self._next_s:
                return self._newest
            took_s, taken = await self._service.engine.run(timed_snapshot, self._replica)
            self._newest, self._next_s = taken, time.monotonic() + max(EVERY_S, took_s / MOST_OF_ENGINE)
            return taken

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, until the server shuts down or the engine fails."""
        sent: Snapshot | None = None
        sent_s = time.monotonic()
        while not self._service.is_closing and self._service.engine.error is None:
            try:
                now = await self.newest()
            except EngineDeadError:
                break  # a client may connect again, to the one that replaces it
            if now != sent:
                yield event(diff(sent, now))
                sent, sent_s = now, time.monotonic()
            elif time.monotonic() - sent_s > QUIET_S:
                yield b": no change\n\n"
                sent_s = time.monotonic()
            await asyncio.sleep(EVERY_S)
        yield CLOSING


@router.get("/events", include_in_schema=False)
async def events(request: Request, replica: int = 0) -> Response:
    """Server-sent events for the page at /: of one replica, if there are several."""
    if service_of(request).is_closing:
        raise closing_error()
    live_events: list[LiveEvents] = request.app.state.live_events
    if not 0 <= replica < len(live_events):
        raise APIError(400, f"replica={replica}: must be from 0 to {len(live_events) - 1}", param="replica")
    return EventStream(live_events[replica].events())
