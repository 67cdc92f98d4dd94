"""The recordings that the page plays are runs of this engine, and show what they are there to show."""

from __future__ import annotations

import json
from typing import Any

import pytest

from paged_infer.server.page.recordings import FOLDER, Scenario, recording, scenarios
from paged_infer.server.routes.page import RECORDINGS

SCENARIOS = scenarios()


def stored(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def steps_of(name: str) -> list[dict[str, Any]]:
    return [record for record in stored(name)["records"] if record["scheduled"]]


def total(name: str, count: str) -> int:
    return sum(step.get(count, 0) for step in steps_of(name))


def test_there_is_a_recording_of_each_scenario() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {*SCENARIOS} == {*RECORDINGS}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 100_000


@pytest.mark.parametrize("name", ["shared", "swap"])
def test_a_recording_is_what_the_engine_does_now(name: str) -> None:
    scenario: Scenario = SCENARIOS[name]
    assert json.loads(json.dumps(recording(scenario))) == stored(name)


def test_the_others_have_the_options_and_prompts_of_their_scenario() -> None:
    for name, scenario in SCENARIOS.items():
        found = stored(name)
        assert (found["about"], found["options"]) == (scenario.about, scenario.options)
        prompts = [one.prompt for one in scenario.requests for _ in range(one.n)]
        assert [story["prompt"] for story in found["stories"]] == prompts
        assert all(story["pieces"] for story in found["stories"])


def test_eight_stories_decode_in_one_batch() -> None:
    assert max(len(step["scheduled"]) for step in steps_of("eight")) == 8


def test_the_long_prompt_is_cut_and_delays_no_decode() -> None:
    chunks = [step for step in steps_of("long") if [4, 1] in [[i, p] for i, _, p in step["scheduled"]]]
    assert len(chunks) >= 5, "a prefill of several steps"
    for step in chunks:
        assert [i for i, count, is_prefill in step["scheduled"] if count == 1 and not is_prefill] == [0, 1, 2, 3]


def test_samples_share_copy_on_write_and_are_found_in_the_cache() -> None:
    assert total("shared", "copies") == 3 and total("shared", "hits") == 80


def test_one_pool_is_too_small_and_the_other_swaps() -> None:
    for name in ("recompute", "swap"):
        assert sum(len(step.get("preempted", [])) for step in steps_of(name)) >= 4
    assert total("recompute", "swapped_out") == 0
    assert 0 < total("swap", "swapped_in") <= total("swap", "swapped_out"), "some are still in the prefix cache"

    def texts(name: str) -> list[str]:
        return ["".join(text for _, text in story["pieces"]) for story in stored(name)["stories"]]

    assert texts("recompute") == texts("swap"), "law 1"
