"""LiveEvents: how often an engine is observed, what each client gets, and what is kept."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from paged_infer.control.step_log import Taken
from paged_infer.control.trace_step import Publish
from paged_infer.engine.snapshot import Observation, Snapshot
from paged_infer.server.routes import live_events


class Clock:
    """``time`` and ``asyncio`` as live_events.py uses them; time passes only in sleep and in observations."""

    Lock, shield, ensure_future = asyncio.Lock, staticmethod(asyncio.shield), staticmethod(asyncio.ensure_future)

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(live_events, "time", clock)
    monkeypatch.setattr(live_events, "asyncio", clock)
    return clock


def watch_of(
    clock: Clock, take_s: float, blocks: list[int | None], gap_at: int | None = None
) -> tuple[live_events.LiveEvents, list[float]]:
    """A watch of an engine that publishes these blocks, one between two looks, and the times of the looks.

    ``gap_at``: steps are missing before this look.
    """
    looks: list[float] = []

    async def run(observe: Any, replica: int) -> Observation:
        block = blocks[len(looks)]
        looks.append(clock.now_s)
        clock.now_s += take_s
        follows = len(looks) - 1 != gap_at
        state = Snapshot({"looks": len(looks)}, 16, [], []) if observe.keywords["whole"] or not follows else None
        return Observation(Taken([], () if block is None else (Publish(block),)), state, follows, take_s)

    engine = SimpleNamespace(error=None, run=run)
    return live_events.LiveEvents(SimpleNamespace(is_closing=False, engine=engine)), looks  # type: ignore[arg-type]


def read(watched: live_events.LiveEvents, num: int) -> list[Any]:
    """The next events of a new client: "looks=n" for a snapshot, else the blocks published."""

    def short(message: dict[str, Any]) -> Any:
        if "snapshot" in message:
            return f"looks={message['snapshot']['stats']['looks']}"
        return [event[1] for record in message["records"] for event in record["events"]]

    async def collect() -> list[Any]:
        events = watched.events()
        return [short(json.loads((await anext(events)).decode().removeprefix("data: "))) for _ in range(num)]

    return asyncio.run(collect())


def test_what_does_not_change_is_not_sent_and_a_busy_engine_is_observed_ten_times_a_second_at_most(clock) -> None:
    watched, looks = watch_of(clock, 0.001, [None, 1, None, None, 2, 3])
    assert read(watched, 4) == ["looks=1", [1], [2], [3]] and len(looks) == 6
    assert all(later - earlier >= live_events.EVERY_S for earlier, later in pairwise(looks))


def test_a_second_client_of_the_same_moment_needs_no_look_of_its_own(clock) -> None:
    watched, looks = watch_of(clock, 0.001, [None, 1, 2, None])
    assert read(watched, 1) == read(watched, 1) == ["looks=1"] and len(looks) == 1
    assert read(watched, 3) == ["looks=1", [1], [2]]
    assert read(watched, 1) == ["looks=4"], "and not all the records since the first"


def test_an_engine_that_takes_long_to_observe_is_observed_less_often(clock) -> None:
    watched, looks = watch_of(clock, 0.03, [1, 2, 3])
    assert read(watched, 3) == ["looks=1", [2], [3]]
    assert all(later - earlier >= 0.03 / live_events.MOST_OF_ENGINE > 0.5 for earlier, later in pairwise(looks))


def test_where_steps_are_missing_a_client_begins_again(clock) -> None:
    watched, _ = watch_of(clock, 0.001, [None, 1, 2, 3], gap_at=2)
    assert read(watched, 4) == ["looks=1", [1], "looks=3", [3]]


def test_a_client_that_is_too_slow_begins_again(clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_events, "MOST_RECORDS", 2)
    watched, _ = watch_of(clock, 0.001, [None, 1, 2, 3, 4])

    async def both() -> list[Any]:
        (_, first), (_, second) = await watched.join(), await watched.join()
        for _ in range(3):
            await clock.sleep(1)
            first += len(await watched.after(first) or ())
        return [first, await watched.after(second)]

    assert asyncio.run(both()) == [3, None]


def test_a_client_that_has_fallen_behind_gets_a_bounded_number_at_once(clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_events, "MOST_SENT", 2)
    watched, _ = watch_of(clock, 0.001, [None, 1, 2, 3])

    async def behind() -> list[list[Any]]:
        _, number = await watched.join()
        for _ in range(3):
            await clock.sleep(1)
            await watched.after(number)
        pieces = [await watched.after(number) or [], await watched.after(number + 2) or []]
        return [[record["events"][0][1] for record in piece] for piece in pieces]

    assert asyncio.run(behind()) == [[1, 2], [3]]


def test_a_client_that_leaves_during_an_observation_takes_no_step_from_others() -> None:
    async def leave() -> list[Any]:
        go_on, calls = asyncio.Event(), []

        async def run(observe: Any, replica: int) -> Observation:
            calls.append(observe)
            if len(calls) == 2:
                await go_on.wait()
                return Observation(Taken([], (Publish(7),)), None, True, 0.0)
            return Observation(Taken([], ()), Snapshot({}, 16, [], []), True, 0.0)

        engine = SimpleNamespace(error=None, run=run)
        watched = live_events.LiveEvents(SimpleNamespace(is_closing=False, engine=engine))  # type: ignore[arg-type]
        _, number = await watched.join()
        watched._next_s = 0.0
        leaver = asyncio.create_task(watched.after(number))
        while len(calls) < 2:
            await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        go_on.set()
        while not watched._records:
            await asyncio.sleep(0)
        return await watched.after(number) or []

    assert [record["events"] for record in asyncio.run(leave())] == [[["publish", 7]]]
