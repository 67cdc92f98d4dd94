"""Speculation in the engine: the same tokens as without it, whoever drafts and however the steps are cut."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import FAMILIES, VOCAB
from effort import each_with_some

from paged_infer import LLM, BeamSearchParams, SamplingParams

MakeLLM = Callable[..., LLM]

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "block-16": {},
    "block-3-chunk-7": {"block_size": 3, "num_blocks": 200, "max_num_batched_tokens": 7},
    "block-1-chunk-64": {"block_size": 1, "num_blocks": 400, "max_num_batched_tokens": 64},
    "block-1-preempting": {"block_size": 1, "num_blocks": 88},
    "block-3-swapping": {"block_size": 3, "num_blocks": 30, "preemption_mode": "swap"},
    "uncached": {"enable_prefix_caching": False},
    "prefill-first": {"scheduling_policy": "prefill_first", "max_num_batched_tokens": 512, "max_model_len": 512},
    "static": {"scheduling_policy": "static", "max_num_batched_tokens": 512, "max_model_len": 512},
}


def prompts() -> list[list[int]]:
    """Some say the same again, so that there is something to look up; two begin alike."""
    rng = random.Random(3)
    tale = [rng.randrange(2, VOCAB) for _ in range(9)]
    return [tale * 2, [*tale * 2, 7], tale[:3] * 5, tale[:1], [rng.randrange(2, VOCAB) for _ in range(17)]]


GREEDY = SamplingParams(temperature=0, max_tokens=24)
SEEDED = [SamplingParams(temperature=0.8, seed=i, max_tokens=24, n=1 + i % 2) for i in range(5)]
EDITED = [
    SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.3, logprobs=2),
    SamplingParams(temperature=0.7, seed=1, max_tokens=20, presence_penalty=1.5, frequency_penalty=0.5, n=2),
    SamplingParams(temperature=0, max_tokens=20, logit_bias={5: 4.0, 9: -50.0}, min_tokens=15, logprobs=0),
    SamplingParams(temperature=0.8, seed=2, top_k=5, max_tokens=20, logprobs=1, prompt_logprobs=1),
    SamplingParams(temperature=1.5, seed=3, top_p=0.9, min_p=0.01, max_tokens=20),
]


def said(llm: LLM, params: Any) -> list[Any]:
    """Everything that does not depend on the clock."""
    outputs = llm.generate(prompts(), params, use_tqdm=False)
    llm.check_integrity()
    assert llm.stats()["free_blocks"] == llm.stats()["num_blocks"]
    return [
        (one.token_ids, one.finish_reason, one.stop_reason, one.text, flat(one.logprobs))
        for output in outputs
        for one in output.outputs
    ]


def flat(logprobs: Any) -> list[float]:
    """Token, rank and logprob, one after the other."""
    rows = (entry for row in logprobs or () for entry in row.items())
    return [n for t, entry in rows for n in (t, entry.rank, entry.logprob)]


def assert_same(one: list[Any], other: list[Any]) -> None:
    """The logprobs to within a rounding error, all else exactly."""
    assert [told[:4] for told in one] == [told[:4] for told in other]
    for a, b in zip(one, other, strict=True):
        assert a[4] == pytest.approx(b[4], abs=1e-4, rel=0)


@pytest.fixture(scope="module")
def expected(make_llm: MakeLLM) -> Callable[[str, str], list[Any]]:
    made: dict[tuple[str, str], list[Any]] = {}

    def without(family: str, kind: str) -> list[Any]:
        if (family, kind) not in made:
            made[family, kind] = said(make_llm(family), KINDS[kind])
        return made[family, kind]

    return without


KINDS: dict[str, Any] = {"greedy": GREEDY, "seeded": SEEDED, "edited": EDITED}


@pytest.mark.parametrize(("family", "options"), each_with_some(FAMILIES, SETTINGS, whole="qwen3"))
def test_drafts_do_not_change_a_token(family, options, make_llm, expected) -> None:
    llm = make_llm(family, speculative_config=NGRAM, **options)
    for kind in KINDS:
        assert_same(said(llm, KINDS[kind]), expected(family, kind))
    stats = llm.stats()
    assert stats["num_draft_tokens"] > stats["num_drafts"] > 0
    if options.get("num_blocks", 200) < 100:
        assert stats["preemptions"] > 0


def test_repetitive_text_is_accepted_and_takes_fewer_steps(make_llm) -> None:
    tale = [17, 23, 99, 412] * 12
    steps = {}
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logit_bias=dict.fromkeys(tale, 100.0))
    for config in (None, NGRAM):
        llm = make_llm(speculative_config=config)
        tokens = llm.generate([tale], params, use_tqdm=False)[0].outputs[0].token_ids
        steps[config is None] = (tokens, llm.stats()["steps"])
        accepted = llm.stats()["num_accepted_tokens"]
    (plain, num_plain), (drafted, num_drafted) = steps[True], steps[False]
    assert plain == drafted and num_plain == 40
    assert accepted == num_plain - num_drafted > 0
    assert llm.stats()["acceptance_rate"] == accepted / llm.stats()["num_draft_tokens"] > 0


class Prophet:
    """Drafts that are right, from having heard the text before, and now and then one that is not."""

    def __init__(self, texts: list[list[int]], seed: int = 0) -> None:
        self._texts, self._rng = texts, random.Random(seed)

    def propose(self, token_ids: list[int], most: int) -> list[int]:
        known = [t for t in self._texts if t[: len(token_ids)] == token_ids]
        drafts = known[0][len(token_ids) :][: min(most, 6)] if known else []
        return [self._rng.randrange(VOCAB) if self._rng.random() < 0.1 else t for t in drafts]


def prophesied(llm: LLM, params: SamplingParams, prompt: Any) -> tuple[Any, Any, LLM]:
    """What is said of a prompt without drafts, and with drafts that are nearly all right."""
    plain = llm.generate(prompt, params, use_tqdm=False)[0]
    llm.engine.scheduler.proposer = Prophet([[*plain.prompt_token_ids, *told] for told in heard(llm, params, prompt)])
    drafted = llm.generate(prompt, params, use_tqdm=False)[0]
    llm.check_integrity()
    return plain, drafted, llm


def heard(llm: LLM, params: SamplingParams, prompt: Any) -> list[list[int]]:
    """How it would go on if nothing stopped it."""
    free = SamplingParams(temperature=params.temperature, seed=params.seed, n=params.n, ignore_eos=True, max_tokens=60)
    return [one.token_ids for one in llm.generate(prompt, free, use_tqdm=False)[0].outputs]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_within_a_run_of_accepted_drafts_ends_the_text_there(text_llm, streamed) -> None:
    free = SamplingParams(temperature=0.9, seed=5, max_tokens=40, ignore_eos=True)
    text = text_llm.generate("ab ba", free, use_tqdm=False)[0].outputs[0].text
    for begin in (5, 11, 20):
        params = SamplingParams(
            temperature=0.9, seed=5, max_tokens=40, ignore_eos=True, stop=text[begin : begin + 3], logprobs=1
        )
        plain, drafted, llm = prophesied(text_llm, params, "ab ba")
        if streamed:
            *_, drafted = llm.stream("ab ba", params)
        a, b = plain.outputs[0], drafted.outputs[0]
        assert (a.text, a.token_ids, a.stop_reason) == (b.text, b.token_ids, b.stop_reason)
        assert a.finish_reason == b.finish_reason == "stop" and len(a.logprobs) == len(b.logprobs)
        assert drafted.metrics.num_generation_tokens == len(a.token_ids)
    assert text_llm.stats()["num_accepted_tokens"] > 0


def test_an_end_token_within_a_run_ends_the_sequence_there(make_llm) -> None:
    llm = make_llm()
    text = heard(llm, GREEDY, [[5, 6, 7]])[0]
    for place in (3, 4, 9):
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop_token_ids=[text[place]])
        plain, drafted, _ = prophesied(llm, params, [[5, 6, 7]])
        assert plain.outputs[0].token_ids == drafted.outputs[0].token_ids
        assert drafted.outputs[0].finish_reason == "stop"
    assert llm.stats()["num_accepted_tokens"] > 0


def test_the_next_request_finds_the_blocks_that_accepted_drafts_have_filled(make_llm) -> None:
    llm = make_llm(block_size=4, num_blocks=100)
    _, drafted, _ = prophesied(llm, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), [[5, 6, 7]])
    follow = [5, 6, 7, *drafted.outputs[0].token_ids, 8]
    again = llm.generate([follow], GREEDY, use_tqdm=False)[0]
    assert again.metrics.num_cached_tokens == 32
    fresh = make_llm().generate([follow], GREEDY, use_tqdm=False)[0]
    assert again.outputs[0].token_ids == fresh.outputs[0].token_ids


def test_an_abort_and_a_failing_step_leave_nothing_behind(make_llm, expected, monkeypatch) -> None:
    llm = make_llm(speculative_config=NGRAM)
    stream = llm.stream(prompts()[0], GREEDY)
    for _ in range(4):
        next(stream)
    stream.close()
    llm.check_integrity()
    launch, calls = llm.engine.executor.runner.launch, []

    def fail_at_times(step: Any) -> Any:
        calls.append(step)
        if sum(s.num_drafts for s in step.sequences) and len(calls) % 3 == 0:
            raise OSError("the device is gone")
        return launch(step)

    monkeypatch.setattr(llm.engine.executor.runner, "launch", fail_at_times)
    for request in llm.prepare(prompts(), GREEDY):
        llm.engine.submit(request)
    done, num_failed = {}, 0
    while llm.engine.has_unfinished_requests:
        try:
            done |= {int(o.request_id): o.outputs[0].token_ids for o in llm.engine.step().outputs}
        except OSError:
            num_failed += 1
        llm.check_integrity()
    assert num_failed > 2
    assert [done[i] for i in sorted(done)] == [one[0] for one in expected("qwen3", "greedy")]


def test_beams_find_the_same_answers_beside_those_who_speculate(make_llm) -> None:
    beam = BeamSearchParams(beam_width=3, max_tokens=8)
    plain, drafting = (make_llm(speculative_config=config) for config in (None, NGRAM))
    a, b = (llm.beam_search(prompts(), beam, use_tqdm=False) for llm in (plain, drafting))
    assert [[one.token_ids for one in o.outputs] for o in a] == [[one.token_ids for one in o.outputs] for o in b]
    assert drafting.stats()["num_drafts"] == 0


def test_a_config_that_cannot_be_used_is_refused_before_anything_is_loaded(checkpoint) -> None:
    with pytest.raises(ValueError, match=r"unknown tokens \(did you mean num_speculative_tokens\?\); known: method"):
        LLM(checkpoint("qwen3"), speculative_config={**NGRAM, "tokens": 3})
    with pytest.raises(ValueError, match="async_scheduling=True with speculative_config"):
        LLM(checkpoint("qwen3"), speculative_config=NGRAM, async_scheduling=True)


def draft_config(folder: Path, num_speculative_tokens: int = 4) -> dict[str, Any]:
    return {"method": "draft_model", "model": folder, "num_speculative_tokens": num_speculative_tokens}


DRAFTED = ("block-16", "block-3-chunk-7", "block-1-preempting", "block-3-swapping", "uncached")


@pytest.mark.parametrize("options", DRAFTED)
@pytest.mark.parametrize(("family", "draft"), [("qwen3", "qwen3"), ("gpt2", "qwen3"), ("mistral", "mistral")])
def test_a_draft_model_does_not_change_a_token(family, draft, options, make_llm, checkpoint, expected) -> None:
    """A model that drafts for itself is nearly always right, and any other of these nearly never."""
    llm = make_llm(family, speculative_config=draft_config(checkpoint(draft)), **SETTINGS[options])
    for kind in KINDS:
        assert_same(said(llm, KINDS[kind]), expected(family, kind))
    stats = llm.stats()
    assert stats["num_drafts"] > 0
    assert stats["acceptance_rate"] > 0.9 if family == draft else stats["acceptance_rate"] < 0.1
    if options.endswith("ing"):
        assert stats["preemptions"] > 0


def test_a_draft_model_reads_what_the_prefix_cache_has_and_what_comes_back_from_swap_space(
    make_llm, checkpoint
) -> None:
    """One that drafts for itself is right to the last token only if its own keys are where the tables say."""
    config = draft_config(checkpoint("qwen3"))
    llm = make_llm(speculative_config=config, block_size=4, num_blocks=24, preemption_mode="swap")
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=30, ignore_eos=True)
    for _ in range(2):
        outputs = llm.generate([p[:18] for p in prompts()], params, use_tqdm=False)
    stats = llm.stats()
    assert stats["preemptions"] > 0 and stats["blocks_swapped_in"] > 0
    assert any(output.metrics.num_cached_tokens for output in outputs)
    assert stats["acceptance_rate"] > 0.99


def test_a_draft_model_of_other_tokens_or_of_fewer_positions_is_refused(make_llm, checkpoint) -> None:
    from paged_infer import storyteller

    with pytest.raises(ValueError, match=r"has a vocabulary of 1755 tokens, but the target model has one of 1003"):
        make_llm(speculative_config=draft_config(storyteller.DRAFT_PATH))
    with pytest.raises(ValueError, match=r"max_model_len=100 exceeds the draft model's .*=64"):
        make_llm(speculative_config=draft_config(short_sighted(checkpoint)), max_model_len=100)


def test_a_draft_model_that_produces_nan_costs_its_drafts_and_nothing_else(make_llm, checkpoint, caplog) -> None:
    llm = make_llm(speculative_config=draft_config(checkpoint("qwen3")))
    broken = llm.engine.executor.drafter.runner.decoder
    broken.register_forward_hook(lambda module, inputs, hidden: hidden.fill_(math.nan))
    drafting, plain = (one.generate(prompts(), GREEDY, use_tqdm=False) for one in (llm, make_llm()))
    assert [o.outputs[0].token_ids for o in drafting] == [o.outputs[0].token_ids for o in plain]
    assert llm.stats()["num_draft_tokens"] > 0 and llm.stats()["num_accepted_tokens"] == 0
    assert len([r for r in caplog.records if "draft model's logits" in r.message]) == 1
    llm.check_integrity()


def short_sighted(checkpoint: Callable[[str], Path]) -> Path:
    """The same model, said to see 64 tokens."""
    folder = checkpoint("qwen3").parent / "short-sighted"
    shutil.copytree(checkpoint("qwen3"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    return folder


def test_the_storyteller_accepts_most_of_what_its_draft_model_says() -> None:
    from paged_infer import storyteller

    config = draft_config(storyteller.DRAFT_PATH)
    begin = ["Once upon a time", "Mia had a red key."]
    for params in (
        SamplingParams(temperature=0, max_tokens=80, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=2, max_tokens=80, n=2, ignore_eos=True),
    ):
        plain, drafting = LLM(num_blocks=64), LLM(num_blocks=64, speculative_config=config)
        a, b = (llm.generate(begin, params, use_tqdm=False) for llm in (plain, drafting))
        assert [[one.text for one in o.outputs] for o in a] == [[one.text for one in o.outputs] for o in b]
        assert drafting.stats()["acceptance_rate"] > 0.5
        assert drafting.stats()["steps"] < plain.stats()["steps"] / 2
