"""The page in a Chromium: stories, the pool and its steps, recordings, both themes, a narrow screen.

Skipped where playwright or a Chromium is missing; see tests/test_jupyterlab.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from os import environ
from typing import Any

import pytest
from holding import LIMIT_S
from serving import Served, serving

from paged_infer.control.blocks.snapshot import pool_cells
from paged_infer.control.step_log import Taken
from paged_infer.engine.snapshot import Snapshot
from paged_infer.server.page.recordings import Request, Scenario, beginnings, run
from paged_infer.server.page.records import records_json, snapshot_json
from paged_infer.server.service import Settings

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
MAP = "canvas => canvas.toDataURL()"
AS_IT_HAPPENS = "Infinity"


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


def opened(page: Any, served: Served, speed: str = AS_IT_HAPPENS) -> None:
    page.goto(served.url)
    page.get_by_text(re.compile(r"^0 of .* blocks")).wait_for()
    page.get_by_label("Speed").select_option(speed)


def set_option(page: Any, label: str, value: str) -> None:
    page.locator("form details").evaluate("one => { one.open = true; }")
    page.get_by_label(label).fill(value)


def test_a_typed_prompt_goes_on_and_the_map_changes(page: Any) -> None:
    with serving(max_num_seqs=4, num_blocks=64) as served:
        opened(page, served)
        before = page.locator("#map").evaluate(MAP)
        page.get_by_label("Prompt", exact=False).first.fill("Once upon a time")
        set_option(page, "Max tokens", "150")
        with served.held() as steps:
            page.locator("#prompt").press("Control+Enter")
            steps.allow(60)
            page.locator("#running .chip").first.wait_for()
            page.wait_for_function("() => document.querySelector('article .text').textContent.length > 20")
            page.wait_for_function(f"before => ({MAP})(document.querySelector('#map')) !== before", arg=before)
        page.get_by_text(re.compile(r"^ended after ")).wait_for()
        page.get_by_text(re.compile(r"^0 of 64 blocks")).wait_for()
        page.locator("#map").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.get_by_text("Block 1:").wait_for()


def test_eight_stories_fill_the_queues_and_can_be_stopped(page: Any) -> None:
    with serving(max_num_seqs=4, num_blocks=256) as served:
        opened(page, served)
        set_option(page, "Max tokens", "900")
        with served.held() as steps:
            page.get_by_role("button", name="Start 8 stories").click()
            page.wait_for_function("() => document.querySelectorAll('#waiting .chip').length === 8")
            steps.run(8)
            page.wait_for_function("() => document.querySelectorAll('#running .chip').length === 4")
            assert page.locator("#waiting .chip").count() == 4
            assert page.locator("article").count() == 8
            page.wait_for_function(
                "() => [...document.querySelectorAll('article')].filter(one => one.style.borderLeftColor).length === 8"
            )
            page.get_by_role("button", name="Stop all").click()
            page.wait_for_function("() => document.querySelectorAll('#stories button').length === 0")
            served.check_idle()
        assert page.locator("article .state", has_text="stopped").count() == 8


def test_a_long_queue_is_cut_and_counted_and_samples_are_stories(page: Any) -> None:
    with serving(max_num_seqs=4, num_blocks=64) as served:
        opened(page, served)
        set_option(page, "Samples of each prompt", "3")
        with served.held() as steps:
            answer = served.begin(prompt=["Once"] * 67, max_tokens=1)
            page.get_by_text("and 3 more").wait_for()
            page.locator("#start").click()
            page.get_by_text("and 6 more").wait_for()
            assert page.locator("#waiting .chip").count() == 64 and page.locator("article").count() == 3
            steps.allow()
            assert answer.result(LIMIT_S).status_code == 200
            page.wait_for_function("() => document.querySelectorAll('#stories button').length === 0")
        page.locator("article .state", has_text="ended after").nth(2).wait_for()
        texts = page.locator("article .text").all_text_contents()
        assert len({*texts}) == 3, "three samples, each with its own text"


def test_a_key_is_asked_for_and_used(page: Any) -> None:
    with serving(Settings(api_key="secret"), num_blocks=64) as served:
        page.goto(served.url)
        page.get_by_text("the server requires an API key").wait_for()
        page.get_by_label("API key").fill("secret")
        page.get_by_text(re.compile(r"^0 of 64 blocks")).wait_for()
        page.get_by_label("Speed").select_option(AS_IT_HAPPENS)
        page.get_by_role("button", name="Start", exact=True).click()
        page.get_by_text(re.compile(r"^ended after ")).wait_for()


def test_errors_are_shown_and_markup_is_text(page: Any) -> None:
    with serving(num_blocks=64, max_model_len=64) as served:
        opened(page, served)
        page.locator("#prompt").fill("<img src=x onerror=alert(1)> " * 40)
        page.get_by_role("button", name="Start", exact=True).click()
        page.locator("article .alarm").wait_for()
        assert "max_model_len=64" in page.locator("article .state").text_content()
        page.evaluate("""() => {
            const story = new Story("<i>name</i>", "<i>prompt</i>", 0);
            story.request = "x";
            story.add("<img src=x onerror=alert(1)>", 1);
            story.show(new Pool({stats: {num_blocks: 1}, block_size: 1, sequences: [], hashed: []}), true);
            document.querySelector("#stories").append(story.card);
        }""")
        assert page.locator("article img, article i").count() == 0
        assert page.get_by_text("<img src=x onerror=alert(1)>", exact=True).count() == 1


def test_a_slow_speed_holds_up_no_request_and_every_step_can_be_seen(page: Any) -> None:
    page.clock.install(time=0)
    page.clock.pause_at(1000)
    with serving(max_num_seqs=4, num_blocks=64) as served:
        opened(page, served, speed="10")
        set_option(page, "Max tokens", "50")
        set_option(page, "Temperature", "0")
        page.locator("#start").click()
        page.wait_for_function("() => sources.live.stories[0].result !== null")
        page.wait_for_function("() => sources.live.history.records.filter(isStep).length === 50")
        shown = "document.querySelector('#where').textContent"
        page.clock.run_for(1000)
        step = int(page.evaluate(f"/step ([0-9]+)/.exec({shown})[1]"))
        assert 8 <= step <= 10, "ten steps in a second of the page's clock"
        assert "behind the server" in page.evaluate(shown)
        assert page.locator("article .state").text_content().startswith("S0, decode: ")
        text = page.locator("article .text").text_content()
        page.get_by_role("button", name="Pause").click()
        page.clock.run_for(1000)
        assert page.locator("article .text").text_content() == text
        page.get_by_role("button", name="One step on").click()
        assert page.evaluate(shown).startswith(f"step {step + 1},")
        page.get_by_label("Speed").select_option("200")
        page.clock.run_for(2000)
        assert page.locator("article .state").text_content().startswith("ended after ")
        assert page.evaluate(shown) == "step 50, now"


def test_a_recording_can_be_stepped_scrubbed_and_played_to_its_end(page: Any, served: Served) -> None:
    page.emulate_media(reduced_motion="reduce")
    page.clock.install(time=0)
    page.clock.pause_at(1000)
    opened(page, served, speed="200")
    page.get_by_role("button", name="A pool too small").click()
    page.get_by_text(re.compile("^A recording, not this server")).wait_for()
    page.get_by_role("button", name="Play").wait_for()  # with reduced motion nothing moves by itself
    happens = page.locator("#happens")
    page.get_by_role("button", name="One step on").click()
    assert happens.text_content().startswith("Step 1, 55 tokens: prefill of S0 (8), S1 (9)")
    for _ in range(2):
        page.get_by_role("button", name="One step on").click()
    page.get_by_role("button", name="One step back").click()
    assert happens.text_content() == "Step 2, 6 tokens: decode of S0, S1, S2, S3, S4, S5."
    first = next(i for i, record in enumerate(page.evaluate("player.history.records")) if record.get("preempted"))
    page.locator("#scrub").fill(str(first + 1))
    assert "S5 is preempted: it gives up its blocks" in happens.text_content()
    assert page.locator("#waiting .chip").text_content().startswith("S5:")
    assert page.locator("article .state").nth(5).text_content() == "S5, preempted: waits again"
    page.get_by_role("button", name="Play").click()
    page.clock.run_for(3000)
    page.get_by_role("button", name="Play").wait_for()
    assert page.locator("article .state").all_text_contents() == ["ended (length)"] * 6
    page.get_by_role("button", name="This server").click()
    page.get_by_text("The engine of this server").wait_for()
    assert page.locator("article:visible").count() == 0


def test_a_story_of_another_replica_is_shown_once_nothing_is_left_to_play(page: Any, served: Served) -> None:
    """Its steps are not among those of the replica that the page watches."""
    page.goto(served.url)
    texts = page.evaluate("""() => {
        const pool = new Pool({stats: {}, block_size: 1, sequences: [], hashed: []}), story = new Story("", "", 0);
        [story.request, story.pieces, story.firstMs] = ["elsewhere", [[1, "text"]], -1e9];
        const shown = isAtEnd => { story.show(pool, false, isAtEnd); return story.part(".text").textContent; };
        return [shown(false), shown(true)];
    }""")
    assert texts == ["", "text"]


def test_a_recording_that_cannot_be_loaded_says_so(page: Any, served: Served) -> None:
    opened(page, served)
    page.route("**/recordings/*", lambda route: route.fulfill(status=503, body="no"))
    page.get_by_role("button", name="Samples that share").click()
    page.get_by_text("This recording could not be loaded: status 503").wait_for()


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_the_page_rebuilds_what_the_trace_rebuilds(page: Any, served: Served, mode: str) -> None:
    """Block by block: owners, tokens, and what is hashed, in every step, forwards and backwards."""
    requests = (*(Request(text, 20) for text in beginnings()[:3]), Request(beginnings()[3], 20, n=3, arrives_at=9))
    options = {"num_blocks": 22, "block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 16}
    llm, _ = run(Scenario("", requests, {**options, "preemption_mode": mode}))
    trace = llm.trace
    expected = []
    for step, replay in zip(trace.steps, trace.replays(), strict=True):
        stored = {i: replay.computed.get(i, 0) + step.scheduled.get(i, 0) for i in replay.tables}
        tables = [(i, table, stored[i]) for i, table in sorted(replay.tables.items())]
        cells = pool_cells(tables, replay.pool, trace.block_size)
        held = sorted([c.block, sorted(c.owners), c.num_tokens] for c in cells.values() if c.owners)
        queues = sorted([i, state.value] for i, state in replay.states.items())
        expected.append([held, sorted(replay.pool.hashed_blocks), queues])
    assert llm.stats()["preemptions"] and any(len(o) > 1 for held, *_ in expected for _, o, _ in held), (
        "a run to compare"
    )
    start = snapshot_json(Snapshot({"num_blocks": trace.num_blocks}, trace.block_size, [], []))
    records = records_json(Taken(trace.steps, ()))
    page.goto(served.url)
    forwards, backwards, num_forgotten, rest = page.evaluate(
        """([start, records]) => {
            History.EVERY = 8;
            let history = new History(start);
            const up = (a, b) => a - b, byFirst = (a, b) => a[0] - b[0];
            history.append(records);
            const state = position => {
                history.seek(position);
                const {pool} = history;
                const held = [...pool.held()].map(([block, one]) => [block, one.owners.sort(up), one.tokens]);
                const queues = [...pool.sequences.values()].filter(one => one.state !== "finished");
                const states = queues.map(one => [one.id, one.state]);
                return [held.sort(byFirst), [...pool.hashed].sort(up), states.sort(byFirst)];
            };
            const places = records.map((_, i) => i + 1);
            const all = [places.map(state), places.toReversed().map(state).toReversed()];
            History.MOST = 16;  // and with the oldest records forgotten
            history = new History(start);
            for (const record of records) history.append([record]);
            return [...all, history.first, places.slice(history.first).map(state)];
        }""",
        [json.loads(json.dumps(start)), json.loads(json.dumps(records))],
    )
    assert forwards == expected == backwards
    assert num_forgotten >= 8 and rest == expected[num_forgotten:]


def test_of_a_large_pool_the_rows_in_use_are_drawn(page: Any) -> None:
    with serving(max_num_seqs=4, num_blocks=4096) as served:
        opened(page, served)
        with served.held() as steps:
            page.locator("#start").click()
            page.locator("#waiting .chip").wait_for()
            steps.run(3)
            page.locator("#running .chip").wait_for()
            assert page.evaluate("map.rows.length * map.columns") <= 64
            assert page.evaluate("map.cell") >= 30, "zoomed"
            assert page.locator("#strip").is_visible()
            page.get_by_label("whole pool").check()
            assert page.evaluate("map.rows.length * map.columns") >= 4096
            page.get_by_label("whole pool").uncheck()
            page.get_by_role("button", name="Stop all").click()
            page.wait_for_function("() => document.querySelectorAll('#stories button').length === 0")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_both_themes_are_legible(page: Any, served: Served) -> None:
    """WCAG 2, AA: 4.5 to 1 for text."""
    papers = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.goto(served.url)
        colours = page.evaluate(
            "Object.fromEntries("
            + json.dumps(["ink", "quiet", "accent", "alarm", "paper", "on-accent"])
            + ".map(name => [name, themed(name)]))"
        )
        papers.add(colours["paper"])
        pairs = [(name, "paper") for name in ("ink", "quiet", "accent", "alarm")] + [("on-accent", "accent")]
        for one, other in pairs:
            low, high = sorted((luminance(colours[one]), luminance(colours[other])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, one, other)
    assert len(papers) == 2


def test_on_a_narrow_screen_story_and_pool_are_in_view_together(page: Any, served: Served) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    opened(page, served)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390

    def in_view(selector: str) -> bool:
        box = page.locator(selector).first.bounding_box()
        return box["y"] >= 0 and box["y"] + min(box["height"], 60) <= 844

    page.locator("#start").click()
    page.locator("article").wait_for()
    assert in_view("#map") and in_view("article")
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    assert in_view("#map"), "it stays while the stories scroll"
    page.get_by_role("button", name="8 stories", exact=True).click()
    page.locator("article:visible").nth(7).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert in_view("#map") and in_view("article:visible")
