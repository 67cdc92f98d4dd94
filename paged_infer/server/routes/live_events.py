"""/events: every step of an engine, for a client that rebuilds its pool and its queues, as server-sent events.

    engine's thread    keeps a log of its steps while a client is connected (control.step_log)
          |            observe() between two steps, at most ten times a second
     LiveEvents        the newest records and the newest snapshot, shared by all clients
          |
    event loop         sends each client a snapshot, then the records after it

A client that is too slow, or whose engine was too fast for the log, gets another snapshot. Only the newest
``MOST_RECORDS`` are kept, however long a client stays connected.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import AsyncIterator
from itertools import islice
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from paged_infer.async_llm import EngineDeadError
from paged_infer.engine.snapshot import Snapshot, observe
from paged_infer.server.openai.errors import APIError
from paged_infer.server.openai.event_stream import EventStream
from paged_infer.server.openai.json_stream import event
from paged_infer.server.page.records import records_json, snapshot_json
from paged_infer.server.service import Service, closing_error, service_of

EVERY_S = 0.1
MOST_OF_ENGINE = 0.05  # largest share of the engine's time for observing it: a large pool is observed less often
MOST_RECORDS = 4096
MOST_SENT = 512  # records in one event: more JSON would block the event loop
QUIET_S = 15.0  # then a comment keeps proxies from closing the connection

CLOSING = b"event: closing\ndata: {}\n\n"
router = APIRouter()


class LiveEvents:
    """Observes one engine, at most every ``EVERY_S`` seconds, and streams what it did.

    One for each replica, in ``app.state.live_events``. Records are numbered from 0; ``_end`` is the next one's number.
    """

    def __init__(self, service: Service, replica: int = 0) -> None:
        self._service = service
        self._replica = replica
        self._lock = asyncio.Lock()
        self._records: deque[dict[str, Any]] = deque(maxlen=MOST_RECORDS)
        self._end = 0
        self._oldest = 0  # records before it are lost
        self._snapshot: tuple[Snapshot, int] | None = None  # the newest, and the number of the first record after it
        self._next_s = self._next_snapshot_s = 0.0  # time.monotonic()

    async def join(self) -> tuple[Snapshot, int]:
        """A snapshot, and the number of the first record after it."""
        async with self._lock:
            known = self._snapshot
            if known is None or known[1] < self._oldest or time.monotonic() >= self._next_snapshot_s:
                await self._observe_shielded(whole=True)
            assert self._snapshot is not None
            return self._snapshot

    async def after(self, number: int) -> list[dict[str, Any]] | None:
        """The records from ``number`` on, at most ``MOST_SENT``, or None if some of them are lost."""
        async with self._lock:
            if time.monotonic() >= self._next_s:
                await self._observe_shielded(whole=False)
            if number < self._oldest:
                return None
            first = len(self._records) - (self._end - number)
            return list(islice(self._records, first, first + MOST_SENT))

    async def _observe_shielded(self, whole: bool) -> None:
        """Finish even if the client disconnects meanwhile: the log gives each step once, and other clients need it."""
        await asyncio.shield(asyncio.ensure_future(self._observe(whole)))

    async def _observe(self, whole: bool) -> None:
        seen = await self._service.engine.run(functools.partial(observe, whole=whole), self._replica)
        records = records_json(seen.taken)
        self._records.extend(records)
        self._end += len(records)
        self._oldest = max(self._oldest, self._end - MOST_RECORDS)
        if not seen.follows:
            self._oldest = self._end
        self._next_s = time.monotonic() + max(EVERY_S, seen.took_s / MOST_OF_ENGINE)
        if seen.snapshot is not None:
            self._snapshot, self._next_snapshot_s = (seen.snapshot, self._end), self._next_s

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, until the server shuts down or the engine fails."""
        number: int | None = None
        sent_s = time.monotonic()
        while not self._service.is_closing and self._service.engine.error is None:
            try:
                if number is None:
                    snapshot, number = await self.join()
                    yield event({"snapshot": snapshot_json(snapshot)}, in_pieces=True)
                    sent_s = time.monotonic()
                records = await self.after(number)
            except EngineDeadError:
                break  # a client may reconnect, to the replica that replaces it
            if records is None:
                number = None
                continue
            if records:
                number += len(records)
                yield event({"records": records})
                sent_s = time.monotonic()
            elif time.monotonic() - sent_s > QUIET_S:
                yield b": no change\n\n"
                sent_s = time.monotonic()
            await asyncio.sleep(EVERY_S)
        yield CLOSING


@router.get("/events", include_in_schema=False)
async def events(request: Request, replica: int = 0) -> Response:
    """Server-sent events for the page at /. With several replicas: those of one."""
    if service_of(request).is_closing:
        raise closing_error()
    live_events: list[LiveEvents] = request.app.state.live_events
    if not 0 <= replica < len(live_events):
        raise APIError(400, f"replica={replica}: must be from 0 to {len(live_events) - 1}", param="replica")
    return EventStream(live_events[replica].events())
