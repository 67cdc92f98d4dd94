"""The page in a Chromium: stories, the map of the pool, both themes, a narrow screen."""

from __future__ import annotations

import json
import re
from typing import Any

from browsing import AS_IT_HAPPENS, opened, set_option
from holding import LIMIT_S
from serving import Served, serving

from paged_infer.server.service import Settings

MAP = "canvas => canvas.toDataURL()"


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
