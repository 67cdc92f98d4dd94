"""The page at / and its /events: whole, sealed, in agreement with the engine, and gone when the server closes.

What it does in a browser: ``page/test_page_in_browser.py``.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
from holding import LIMIT_S, until
from serving import NO_TLS, Served, error_of, serving

from paged_infer.control import trace_step
from paged_infer.control.blocks.pool import BlockPool
from paged_infer.control.sequence_state import SequenceState
from paged_infer.control.trace import Replay
from paged_infer.engine.snapshot import snapshot
from paged_infer.server.page.records import snapshot_json
from paged_infer.server.routes.page import RECORDINGS
from paged_infer.server.service import Settings
from paged_infer.viz.pool_map import CACHED_COLOUR
from paged_infer.viz.sequence_lives import OWNER_COLOURS
from paged_infer.viz.style import FAINT, INK

LONG = {"prompt": "The river was wide and cold. " * 8, "max_tokens": 60, "ignore_eos": True}
EVENTS: dict[str, Any] = {
    name.lower(): kind for name, kind in vars(trace_step).items() if isinstance(kind, type) and hasattr(kind, "_fields")
}


def decoded(event: list[Any]) -> trace_step.Event:
    name, *fields = event
    fields = [tuple(field) if isinstance(field, list) else field for field in fields]
    return EVENTS[name](*fields[:-1], SequenceState(fields[-1])) if name == "transition" else EVENTS[name](*fields)


class Watcher(threading.Thread):
    """Reads /events as the page does, and replays them. It must begin before the first request."""

    def __init__(self, url: str, **headers: str) -> None:
        super().__init__(daemon=True)
        self.snapshots: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []
        self.queued: list[Counter[str]] = []  # after each record: how many sequences are in each state
        self.last_words = ""
        self.replay = Replay(BlockPool(1))
        self._url, self._headers = url, headers
        self._is_told = threading.Event()
        self.start()
        assert self._is_told.wait(LIMIT_S)

    def run(self) -> None:
        with httpx.stream("GET", f"{self._url}/events", headers=self._headers, timeout=LIMIT_S, **NO_TLS) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line.startswith("event: "):
                    self.last_words = line.removeprefix("event: ")
                elif line.startswith("data: ") and not self.last_words:
                    self.read(json.loads(line.removeprefix("data: ")))

    def read(self, message: dict[str, Any]) -> None:
        if "snapshot" in message:
            self.snapshots.append(message["snapshot"])
            self.replay = Replay(BlockPool(message["snapshot"]["stats"]["num_blocks"]))
            self._is_told.set()
        for record in message.get("records", []):
            for sequence_id, num_tokens, _ in self.records[-1]["scheduled"] if self.records else []:
                if sequence_id in self.replay.computed:
                    self.replay.computed[sequence_id] += num_tokens
            for event in record["events"]:
                self.replay.apply(decoded(event))
            self.replay.pool.check_integrity([*self.replay.tables.values()])
            self.records.append(record)
            self.queued.append(Counter(state.value for state in self.replay.states.values()))

    def until(self, condition: Callable[[], Any]) -> None:
        until(condition, lambda: (self.records[-1:], self.queued[-1:]))

    def until_queued(self, **sizes: int) -> None:
        self.until(lambda: self.queued and self.queued[-1] == Counter(sizes))

    def until_idle(self) -> None:
        self.until(lambda: self.queued and not self.queued[-1])


def test_events_add_up_to_the_state_of_the_engine() -> None:
    with serving(max_num_seqs=4, num_blocks=64) as served:
        watcher = Watcher(served.url)
        with served.held() as steps:
            answer = served.begin(**{**LONG, "prompt": [LONG["prompt"]] * 6})
            watcher.until_queued(waiting=6)
            steps.run(1)
            watcher.until_queued(running=4, waiting=2)
            state = served.on_engine(snapshot)
            found = {one["id"]: (one["state"], one["table"]) for one in state.sequences}
            tables = watcher.replay.tables
            assert found == {i: (s.value, list(tables.get(i, ()))) for i, s in watcher.replay.states.items()}
            assert max(Counter(block for table in tables.values() for block in table).values()) == 4, "one beginning"
        assert answer.result(LIMIT_S).status_code == 200
        watcher.until_idle()
        assert not watcher.replay.tables and not watcher.replay.pool.num_used
        hashed = set(served.on_engine(lambda engine: engine.manager.pool.hashed_blocks))
        assert set(watcher.replay.pool.hashed_blocks) == hashed != set()
        steps_seen = [record["step"] for record in watcher.records if record["step"]]
        assert steps_seen == list(range(1, served.engine.stats()["steps"] + 1)), "every step, once"
        assert len(watcher.snapshots) == 1


def test_a_client_that_comes_later_begins_with_the_state_as_it_is() -> None:
    with serving(max_num_seqs=4, num_blocks=64) as served:
        first = Watcher(served.url)
        served.complete(**LONG)
        first.until_idle()
        second = Watcher(served.url)
        assert second.snapshots == [json.loads(json.dumps(snapshot_json(served.on_engine(snapshot))))]
        assert set(second.snapshots[0]["hashed"]) == set(first.replay.pool.hashed_blocks)


def test_a_watcher_does_not_hold_up_the_end_and_is_told_of_it() -> None:
    served = Served(Settings(), shutdown_timeout_s=100 * LIMIT_S, num_blocks=64)
    watcher = Watcher(served.url)
    served.stop()
    watcher.join(LIMIT_S)
    assert (watcher.is_alive(), watcher.last_words) == (False, "closing")


def test_a_watcher_that_leaves_costs_nobody_anything() -> None:
    with serving(max_num_seqs=4, num_blocks=64) as served:
        for _ in range(20):
            with httpx.stream("GET", f"{served.url}/events", **NO_TLS) as response:
                next(response.iter_lines())
        assert served.complete(**LONG)["usage"]["completion_tokens"] == 60


def test_a_call_whose_caller_has_gone_leaves_the_engine_alive() -> None:
    with serving(num_blocks=64) as served:
        held, go_on = threading.Event(), threading.Event()
        thread = served.engine._core
        thread.call(lambda engine: (held.set(), go_on.wait(LIMIT_S)))
        assert held.wait(LIMIT_S)
        assert thread.call(lambda engine: pytest.fail("its caller has gone")).cancel()
        go_on.set()
        assert served.complete(prompt="Once", max_tokens=3)["usage"]["completion_tokens"] == 3
        assert served.engine.error is None


def test_the_key_guards_the_events_and_not_the_page() -> None:
    with serving(Settings(api_key="secret"), num_blocks=64) as served:
        assert served.http.get("/").status_code == 200
        assert served.http.get("/events").status_code == 401
        watcher = Watcher(served.url, Authorization="Bearer secret")
        assert watcher.snapshots
        assert served.http.get("/recordings/eight.json").status_code == 401


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.attributes: list[dict[str, str | None]] = []
        self.labelled: set[str | None] = set()
        self.fields: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.attributes.append(given)
        if tag == "label":
            self.labelled.add(given.get("for"))
        if tag in ("input", "textarea", "select"):
            self.fields.append(given["id"])


def test_the_page_is_one_file_that_may_fetch_from_nowhere_else(served: Served) -> None:
    response = served.http.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert re.search(r"script-src 'sha256-[\w+/=]{44}'", policy)
    assert response.headers["x-content-type-options"] == "nosniff"
    tags = Tags()
    tags.feed(response.text)
    assert {"prompt", "max_tokens", "temperature", "n", "key", "speed"} <= set(tags.fields)
    assert set(tags.fields) == tags.labelled | {"scrub"}
    assert not [one for one in tags.attributes if "src" in one or "style" in one or one.get("onclick")]
    assert "//" not in "".join(re.findall(r'(?:href|action)="([^"]*)"', response.text))


def test_recordings_are_served_by_name(served: Served) -> None:
    for name in RECORDINGS:
        answer = served.http.get(f"/recordings/{name}.json")
        assert answer.headers["content-type"] == "application/json" and answer.json()["records"]
    message = error_of(served.http.get("/recordings/other.json"), 404)["message"]
    assert message == "recording 'other': must be one of eight, long, shared, recompute, swap"
    assert served.http.get("/recordings/..%2fpage.json").status_code == 404


def test_the_page_has_the_colours_of_the_figures(served: Served) -> None:
    page = served.http.get("/").text
    assert json.dumps(OWNER_COLOURS) in page
    for colour in (INK, FAINT, CACHED_COLOUR):
        assert colour in page
