"""``python -m paged_infer.server.page.recordings``: write the recordings that the page plays.

Each is a run of a small engine with the bundled storyteller, recorded step by step by its trace. They are files, not
runs on the server that shows them, because a server cannot make its own pool too small, and because playing them must
not slow down other clients.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paged_infer import LLM, SamplingParams, storyteller
from paged_infer.control.step_log import Taken
from paged_infer.engine.snapshot import Snapshot
from paged_infer.server.page.records import records_json, snapshot_json

FOLDER = Path(__file__).with_name("recorded")
NAMES = ("Mia", "Hugo", "Anna", "Tom", "Ida", "Max", "Lea", "Ben")
THINGS = ("a kite", "a grey clock", "a red key", "a blue boat", "a small drum", "a green hat", "a lamp", "a bell")


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt that is added before step ``arrives_at`` of the recording."""

    prompt: str
    max_tokens: int = 60
    n: int = 1
    arrives_at: int = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    """``about``: what to look for. ``options``: those of the engine."""

    about: str
    requests: tuple[Request, ...]
    options: dict[str, Any] = field(default_factory=dict)


def beginnings() -> list[str]:
    """The prompts of eight stories."""
    return [f"A story about {name} and {thing}." for name, thing in zip(NAMES, THINGS, strict=True)]


def long_prompt() -> str:
    """A prompt of stories with their questions, and one more question."""
    texts = [storyteller.tell(seed).text for seed in (3, 5)]
    return "\n".join(texts).rstrip() + "\nQ: Where is"


def scenarios() -> dict[str, Scenario]:
    """The scenarios by the names of their files."""
    story = storyteller.tell(7).text
    shared = story[: story.index(".", 280) + 1]
    eight = (Request(text, 40 + 12 * (i % 4)) for i, text in enumerate(beginnings()))
    four, six = ([Request(text, 64) for text in beginnings()[:n]] for n in (4, 6))
    usual: dict[str, Any] = {"num_blocks": 64, "block_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 48}
    small: dict[str, Any] = {"num_blocks": 20, "block_size": 8, "max_num_seqs": 6, "max_num_batched_tokens": 64}
    return {
        "eight": Scenario(
            "eight stories arrive at once. The first steps compute their prompts (prefill), at most 48 tokens each; "
            "then every step gives each story one token (decode).",
            tuple(eight),
            usual,
        ),
        "long": Scenario(
            "while four stories decode, a long prompt arrives. Its prefill is cut into chunks, at most what the step's "
            "48 tokens leave, so the four get a token in every step.",
            (*four, Request(long_prompt(), 12, arrives_at=14)),
            usual,
        ),
        "shared": Scenario(
            "four samples share their prompt's blocks. Those that write first to the last one get a copy of it "
            "(copy-on-write). Later the prompt comes again, and finds its full blocks in the cache.",
            (Request(shared, 40, n=4), Request(shared, 40, arrives_at=24)),
            {**usual, "num_blocks": 48, "max_num_batched_tokens": 128},
        ),
        "recompute": Scenario(
            "six stories in 20 blocks of 8 tokens. When no block is free, the youngest is preempted: it gives up its "
            "blocks, and later computes again what the prefix cache has lost.",
            tuple(six),
            small,
        ),
        "swap": Scenario(
            "the six stories again, with preemption_mode='swap': the blocks of a preempted one move to swap space, "
            "and back when there is room. Nothing is computed again.",
            tuple(six),
            {**small, "preemption_mode": "swap"},
        ),
    }


def run(scenario: Scenario) -> tuple[LLM, list[dict[str, Any]]]:
    """Run it. Returns the engine, with its trace, and the stories in the page's form."""
    llm = LLM(device="cpu", dtype="float32", trace=True, **scenario.options)
    stories: dict[tuple[str, int], dict[str, Any]] = {}
    waiting = [(str(i), request) for i, request in enumerate(scenario.requests)]
    while waiting or llm.engine.has_unfinished_requests:
        for name, one in [(name, one) for name, one in waiting if one.arrives_at <= llm.stats()["steps"]]:
            params = SamplingParams(n=one.n, temperature=0.8, seed=int(name), max_tokens=one.max_tokens)
            llm.engine.add_request(name, one.prompt, params, streamed=True)
            waiting.remove((name, one))
            for sample in range(one.n):
                about = {"name": f"Story {len(stories) + 1}", "request": name, "sample": sample}
                stories[name, sample] = {**about, "prompt": one.prompt, "pieces": []}
        for output in llm.engine.step().outputs:
            for answer in output.outputs:
                pieces = stories[output.request_id, answer.index]["pieces"]
                known = "".join(text for _, text in pieces)
                if answer.text != known:
                    pieces.append([len(answer.token_ids), answer.text[len(known) :]])
    llm.check_integrity()
    return llm, list(stories.values())


def recording(scenario: Scenario) -> dict[str, Any]:
    """Run it and return the recording. Its ``snapshot`` is the engine before the first step."""
    llm, stories = run(scenario)
    assert llm.trace is not None
    taken = Taken(llm.trace.steps, tuple(llm.engine.manager.events))
    stats: dict[str, int | float] = {**dict.fromkeys(llm.stats(), 0), "num_blocks": llm.trace.num_blocks}
    return {
        "about": scenario.about,
        "options": scenario.options,
        "snapshot": snapshot_json(Snapshot(stats, llm.trace.block_size, [], [])),
        "stories": stories,
        "records": records_json(taken),
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, scenario in scenarios().items():
        path = FOLDER / f"{name}.json"
        path.write_text(json.dumps(recording(scenario), separators=(",", ":"), ensure_ascii=False) + "\n")
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
