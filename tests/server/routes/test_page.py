"""The page at / and its /events: whole, sealed, in agreement with the engine, and gone when the server closes.

The browser's test is skipped where playwright or a Chromium is missing; see tests/test_jupyterlab.py.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from os import environ
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from holding import LIMIT_S, until
from serving import NO_TLS, Served, serving

from paged_infer.engine import snapshot
from paged_infer.server.routes import live_events
from paged_infer.server.service import Settings
from paged_infer.viz.pool_map import CACHED_COLOUR
from paged_infer.viz.sequence_lives import OWNER_COLOURS
from paged_infer.viz.style import FAINT, INK

LONG = {"prompt": "The river was wide and cold. " * 8, "max_tokens": 60, "ignore_eos": True}
QUEUES = ("running", "waiting", "swapped")


class Watcher(threading.Thread):
    """Reads /events as the page does, and keeps what they add up to."""

    def __init__(self, url: str, **headers: str) -> None:
        super().__init__(daemon=True)
        self.events: list[dict[str, Any]] = []  # "map" of each: block -> cell, as all up to it add up
        self.last_words = ""
        self._url, self._headers = url, headers
        self._is_told = threading.Event()
        self.start()
        assert self._is_told.wait(LIMIT_S)

    def run(self) -> None:
        cells: dict[int, tuple[Any, ...]] = {}
        with httpx.stream("GET", f"{self._url}/events", headers=self._headers, timeout=LIMIT_S, **NO_TLS) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line.startswith("event: "):
                    self.last_words = line.removeprefix("event: ")
                elif line.startswith("data: ") and not self.last_words:
                    change = json.loads(line.removeprefix("data: "))
                    for block, *cell in change["cells"]:
                        cells[block] = tuple(cell)
                    cells = {block: cell for block, cell in cells.items() if cell}
                    self.events.append({**change, "map": dict(cells)})
                    self._is_told.set()

    def until(self, condition: Any) -> None:
        until(lambda: condition(self.events[-1]), lambda: self.events[-1])

    def until_queued(self, **sizes: int) -> None:
        self.until(lambda change: all(change["stats"][f"num_{queue}"] == n for queue, n in sizes.items()))


def is_idle(change: dict[str, Any]) -> bool:
    return not any(change["stats"][f"num_{queue}"] for queue in QUEUES)


def test_events_add_up_to_what_the_engine_says_of_itself() -> None:
    with serving(max_num_seqs=4, num_blocks=64) as served:
        watcher = Watcher(served.url)
        with served.held() as steps:
            answer = served.begin(**{**LONG, "prompt": [LONG["prompt"]] * 6})
            watcher.until_queued(waiting=6)
            steps.run(1)
            watcher.until_queued(running=4, waiting=2)
        assert answer.result(LIMIT_S).status_code == 200
        watcher.until(lambda change: is_idle(change) and change["stats"]["prefix_query_tokens"] > 0)
        assert [change["is_whole"] for change in watcher.events] == [True] + [False] * (len(watcher.events) - 1)
        for change in watcher.events:
            stats, cells = change["stats"], change["map"]
            held = {block: cell for block, cell in cells.items() if cell[0]}
            assert len(held) == stats["num_blocks"] - stats["free_blocks"]
            assert {owner for owners, *_ in held.values() for owner in owners} <= {
                one["id"] for one in change["running"]
            }
            assert all(0 <= num_tokens <= change["block_size"] for _, num_tokens, _ in held.values())
            for queue in QUEUES:
                assert len(change[queue]) == stats[f"num_{queue}"]
        shared = [cell for change in watcher.events for cell in change["map"].values() if len(cell[0]) > 1]
        assert shared, "four that run have one beginning"
        assert watcher.events[-1]["stats"] == served.engine.stats()
        findable = {block for block, (_, _, is_hashed) in watcher.events[-1]["map"].items() if is_hashed}
        assert findable == set(served.on_engine(lambda engine: engine.manager.pool.hashed_blocks)) != set()


def test_whoever_comes_later_is_told_the_whole_at_once() -> None:
    with serving(max_num_seqs=4, num_blocks=64) as served:
        first = Watcher(served.url)
        served.complete(**LONG)
        first.until(lambda change: is_idle(change) and change["map"])
        second = Watcher(served.url)
        assert second.events[0]["map"] == first.events[-1]["map"] != {}


class Clock:
    """``time`` and ``asyncio`` as live_events.py uses them; time passes only in sleep and in snapshots."""

    Lock = asyncio.Lock

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    perf_counter = monotonic

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(live_events, "time", clock)
    monkeypatch.setattr(live_events, "asyncio", clock)
    return clock


def watch_of(clock: Clock, take_s: float, snapshots: list[int]) -> tuple[live_events.LiveEvents, list[float]]:
    """A watch of an engine whose ``stats`` are ``snapshots`` one after the other, and when it was looked at."""
    looks: list[float] = []

    async def run(timed_take: Any, replica: int) -> Any:
        looks.append(clock.now_s)
        clock.now_s += take_s
        return take_s, snapshot.Snapshot({"value": snapshots[len(looks) - 1]}, 16, {}, {})

    engine = SimpleNamespace(error=None, run=run)
    return live_events.LiveEvents(SimpleNamespace(is_closing=False, engine=engine)), looks  # type: ignore[arg-type]


def values(watched: live_events.LiveEvents, num: int) -> list[int]:
    async def read() -> list[int]:
        events = watched.events()
        pieces = [(await anext(events)).decode().removeprefix("data: ") for _ in range(num)]
        return [json.loads(piece)["stats"]["value"] for piece in pieces]

    return asyncio.run(read())


def test_what_does_not_change_is_not_told_again_and_a_busy_engine_ten_times_a_second_at_most(clock) -> None:
    watched, looks = watch_of(clock, 0.001, [1, 1, 1, 1, 2, 3, 4])
    assert values(watched, 4) == [1, 2, 3, 4] and len(looks) == 7
    assert all(later - earlier >= live_events.EVERY_S for earlier, later in pairwise(looks))
    assert values(watched, 1) == [4] and len(looks) == 7, "a second watcher of the same moment needs no look of its own"


def test_a_pool_that_takes_long_to_look_at_is_looked_at_less_often(clock) -> None:
    watched, looks = watch_of(clock, 0.03, [1, 2, 3])
    assert values(watched, 3) == [1, 2, 3]
    assert all(later - earlier >= 0.03 / live_events.MOST_OF_ENGINE > 0.5 for earlier, later in pairwise(looks))


def test_long_queues_are_cut_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MOST_LISTED", 3)
    with serving(max_num_seqs=2, num_blocks=64) as served:
        watcher = Watcher(served.url)
        with served.held() as steps:
            answer = served.begin(**{**LONG, "prompt": ["Once"] * 12, "max_tokens": 20})
            watcher.until_queued(waiting=12)
            steps.run(1)
            watcher.until_queued(running=2, waiting=10)
            assert (len(watcher.events[-1]["running"]), len(watcher.events[-1]["waiting"])) == (2, 3)
        assert answer.result(LIMIT_S).status_code == 200
        for change in watcher.events:
            assert len(change["waiting"]) == min(3, change["stats"]["num_waiting"])


def test_snapshots_of_one_moment_are_equal() -> None:
    """So that nothing is sent when nothing has changed."""
    with serving(num_blocks=64) as served:
        served.complete(**LONG)

        one, other = served.on_engine(snapshot.snapshot), served.on_engine(snapshot.snapshot)
        assert one == other and one is not other and one.cells
        change = live_events.diff(one, other)
        assert change["cells"] == [] and not change["is_whole"]


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
        thread = served.engine._thread
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
        assert watcher.events[0]["is_whole"]


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
        if tag in ("input", "textarea"):
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
    assert set(tags.fields) == tags.labelled == {"prompt", "max_tokens", "temperature", "key"}
    assert not [one for one in tags.attributes if "src" in one or "style" in one or one.get("onclick")]
    assert "//" not in "".join(re.findall(r'(?:href|action)="([^"]*)"', response.text))


def test_the_page_has_the_colours_of_the_figures(served: Served) -> None:
    page = served.http.get("/").text
    assert json.dumps(OWNER_COLOURS) in page
    for colour in (INK, FAINT, CACHED_COLOUR):
        assert colour in page


NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
MAP = "canvas => canvas.toDataURL()"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip(f"no Chromium here: looked for {', '.join(NAMES)}")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(1e3 * LIMIT_S)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert not [one for one in complaints if not one.startswith("Failed to load resource")]


def test_in_a_browser_a_typed_prompt_goes_on_and_the_map_changes(page: Any) -> None:
    with serving(max_num_seqs=4, num_blocks=64) as served:
        page.goto(served.url)
        page.get_by_text("0 of 64 blocks").wait_for()
        before = page.locator("#map").evaluate(MAP)
        page.get_by_label("Prompt").fill("Once upon a time")
        page.get_by_label("Max tokens").fill("150")
        with served.held() as steps:
            page.get_by_label("Prompt").press("Control+Enter")
            steps.allow(60)
            page.locator("#running .chip").first.wait_for()
            text = page.locator("article .text")
            page.wait_for_function("() => document.querySelector('article .text').textContent.length > 20")
            page.wait_for_function(f"before => ({MAP})(document.querySelector('#map')) !== before", arg=before)
        page.get_by_text(re.compile(r"^ended after ")).wait_for()
        assert len(text.text_content()) > 20
        page.get_by_text("0 of 64 blocks").wait_for()
        page.locator("#map").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.get_by_text("Block 1:").wait_for()


def test_in_a_browser_eight_stories_fill_the_queues_and_can_be_stopped(page: Any) -> None:
    with serving(max_num_seqs=4, num_blocks=256) as served:
        page.goto(served.url)
        page.get_by_label("Max tokens").fill("900")
        with served.held() as steps:
            page.get_by_role("button", name="Start 8 stories").click()
            page.wait_for_function("() => document.querySelectorAll('#waiting .chip').length === 8")
            steps.run(8)
            page.wait_for_function("() => document.querySelectorAll('#running .chip').length === 4")
            assert page.locator("#waiting .chip").count() == 4
            assert page.locator("article").count() == 8
            page.wait_for_function(
                "() => [...document.querySelectorAll('article')].filter(one => one.style.borderLeftColor).length >= 4"
            )
            page.get_by_role("button", name="Stop all").click()
            page.wait_for_function("() => document.querySelectorAll('#stories button').length === 0")
            served.check_idle()
        assert page.locator("article .state", has_text="stopped").count() == 8


def test_in_a_browser_a_key_is_asked_for_and_used(page: Any) -> None:
    with serving(Settings(api_key="secret"), num_blocks=64) as served:
        page.goto(served.url)
        page.get_by_text("the server requires an API key").wait_for()
        page.get_by_label("API key").fill("secret")
        page.get_by_text("0 of 64 blocks").wait_for()
        page.get_by_role("button", name="Start", exact=True).click()
        page.get_by_text(re.compile(r"^ended after ")).wait_for()


def test_in_a_browser_errors_are_shown_and_markup_is_text(page: Any) -> None:
    with serving(num_blocks=64, max_model_len=64) as served:
        page.goto(served.url)
        page.get_by_label("Prompt").fill("<img src=x onerror=alert(1)> " * 40)
        page.get_by_role("button", name="Start", exact=True).click()
        page.locator("article .alarm").wait_for()
        assert "max_model_len=64" in page.locator("article .state").text_content()
        assert page.locator("article img").count() == 0
