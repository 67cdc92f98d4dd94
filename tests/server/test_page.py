"""The page at / and its /events: whole, sealed, in agreement with the engine, and gone when the server closes.

The browser's test is skipped where playwright or a Chromium is missing; see tests/test_jupyterlab.py.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from os import environ
from typing import Any

import httpx
import pytest
from serving import NO_TLS, Served, serving

from paged_infer.server import watch
from paged_infer.server.service import Settings
from paged_infer.viz.lives import OWNER_COLOURS
from paged_infer.viz.pool_map import CACHED_COLOUR
from paged_infer.viz.style import FAINT, INK

LONG = {"prompt": "The river was wide and cold. " * 8, "max_tokens": 60, "ignore_eos": True}
QUEUES = ("running", "waiting", "swapped")


class Watcher(threading.Thread):
    """Reads /events as the page does, and keeps what they add up to."""

    def __init__(self, url: str, **headers: str) -> None:
        super().__init__(daemon=True)
        self.events: list[dict[str, Any]] = []
        self.maps: list[dict[int, tuple[Any, ...]]] = []
        self.last_words = ""
        self._url, self._headers = url, headers
        self._is_told = threading.Event()
        self.start()
        assert self._is_told.wait(10)

    def run(self) -> None:
        cells: dict[int, tuple[Any, ...]] = {}
        with httpx.stream(
            "GET", f"{self._url}/events", headers=self._headers, timeout=30, **NO_TLS
        ) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line.startswith("event: "):
                    self.last_words = line.removeprefix("event: ")
                elif line.startswith("data: ") and not self.last_words:
                    change = json.loads(line.removeprefix("data: "))
                    for block, *cell in change["cells"]:
                        cells[block] = tuple(cell)
                    cells = {block: cell for block, cell in cells.items() if cell}
                    self.maps.append(dict(cells))
                    self.events.append(change)
                    self._is_told.set()

    def until(self, condition: Any, within_s: float = 10.0) -> None:
        deadline = time.monotonic() + within_s
        while not condition(self.events[-1]):
            assert time.monotonic() < deadline, self.events[-1]
            time.sleep(0.01)


def is_idle(change: dict[str, Any]) -> bool:
    return not any(change["stats"][f"num_{queue}"] for queue in QUEUES)


def test_events_add_up_to_what_the_engine_says_of_itself() -> None:
    with serving(max_num_seqs=4, num_blocks=64) as served:
        watcher = Watcher(served.url)
        served.complete(**{**LONG, "prompt": [LONG["prompt"]] * 6})
        watcher.until(lambda change: is_idle(change) and change["stats"]["prefix_query_tokens"] > 0)
        assert [change["is_whole"] for change in watcher.events] == [True] + [False] * (
            len(watcher.events) - 1
        )
        for change, cells in zip(watcher.events, watcher.maps, strict=True):
            stats = change["stats"]
            held = {block: cell for block, cell in cells.items() if cell[0]}
            assert len(held) == stats["num_blocks"] - stats["free_blocks"]
            assert {owner for owners, *_ in held.values() for owner in owners} <= {
                one["id"] for one in change["running"]
            }
            assert all(0 <= num_tokens <= change["block_size"] for _, num_tokens, _ in held.values())
            for queue in QUEUES:
                assert len(change[queue]) == stats[f"num_{queue}"]
        assert max(len(cell[0]) for cells in watcher.maps for cell in cells.values()) > 1, "nobody shared"
        assert max(change["stats"]["num_waiting"] for change in watcher.events) > 0
        assert watcher.events[-1]["stats"] == served.engine.stats()
        findable = {block for block, (_, _, is_findable) in watcher.maps[-1].items() if is_findable}
        assert findable == set(served.on_engine(lambda engine: engine.manager.pool.findable)) != set()


def test_whoever_comes_later_is_told_the_whole_at_once() -> None:
    with serving(max_num_seqs=4, num_blocks=64) as served:
        first = Watcher(served.url)
        served.complete(**LONG)
        first.until(lambda change: is_idle(change) and first.maps[-1])
        second = Watcher(served.url)
        assert second.maps[0] == first.maps[-1] != {}


def test_what_does_not_change_is_not_told_again_and_a_busy_engine_ten_times_a_second_at_most() -> None:
    with serving(max_num_seqs=4, num_blocks=64) as served:
        watcher = Watcher(served.url)
        time.sleep(0.35)
        assert len(watcher.events) == 1
        began = time.monotonic()
        served.complete(**{**LONG, "max_tokens": 120})
        seconds = time.monotonic() - began
        assert 1 < len(watcher.events) <= 2 + seconds / watch.EVERY_S


def test_a_pool_that_takes_long_to_look_at_is_looked_at_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MOST_OF_ENGINE", 1e-9)
    with serving(max_num_seqs=4, num_blocks=64) as served:
        watcher = Watcher(served.url)
        served.complete(**LONG)
        time.sleep(0.3)
        assert len(watcher.events) == 1


def test_long_queues_are_cut_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MOST_LISTED", 3)
    with serving(max_num_seqs=2, num_blocks=64) as served:
        watcher = Watcher(served.url)
        served.complete(**{**LONG, "prompt": ["Once"] * 12, "max_tokens": 20})
        waiting = [(len(change["waiting"]), change["stats"]["num_waiting"]) for change in watcher.events]
        assert all(listed == min(3, count) for listed, count in waiting)
        assert max(count for _, count in waiting) > 3


def test_snapshots_of_one_moment_are_equal() -> None:
    """So that nothing is told where nothing has changed."""
    with serving(num_blocks=64) as served:
        served.complete(**LONG)

        one, other = served.on_engine(watch.take), served.on_engine(watch.take)
        assert one == other and one is not other and one.cells
        change = watch.change(one, other)
        assert change["cells"] == [] and not change["is_whole"]


def test_a_watcher_does_not_hold_up_the_end_and_is_told_of_it() -> None:
    served = Served(Settings(), shutdown_timeout_s=30.0, num_blocks=64)
    watcher = Watcher(served.url)
    began = time.monotonic()
    served.stop()
    watcher.join(5)
    assert (watcher.is_alive(), watcher.last_words) == (False, "closing")
    assert time.monotonic() - began < 5


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
        thread.call(lambda engine: (held.set(), go_on.wait(10)))
        assert held.wait(10)
        assert thread.call(lambda engine: pytest.fail("nobody waits for this")).cancel()
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
    page.set_default_timeout(20_000)
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
        page.get_by_label("Most tokens").fill("150")
        page.get_by_label("Prompt").press("Control+Enter")
        page.locator("#running .chip").first.wait_for()
        text = page.locator("article .text")
        page.wait_for_function("() => document.querySelector('article .text').textContent.length > 20")
        assert page.locator("#map").evaluate(MAP) != before
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
        page.get_by_label("Most tokens").fill("900")
        page.get_by_role("button", name="Start 8 stories").click()
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
        page.get_by_text("the server asks for an API key").wait_for()
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
