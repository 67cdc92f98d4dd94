"""Playback in a Chromium: every step at any speed, recordings, and the same pool as the trace's replay."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from browsing import opened, set_option
from serving import Served, serving

from paged_infer.control.blocks.snapshot import pool_cells
from paged_infer.control.step_log import Taken
from paged_infer.engine.snapshot import Snapshot
from paged_infer.server.page.recordings import Request, Scenario, beginnings, run
from paged_infer.server.page.records import records_json, snapshot_json


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
