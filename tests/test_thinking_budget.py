"""Reasoning in the engine: where it ends, its budget, and grammars behind it, however the steps are cut."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ranks import ThreadsModels

from paged_infer import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams, storyteller
from paged_infer.baselines import generate_cached
from paged_infer.control.reasoning import REASONING_PARSERS, Part, ReasoningFormat
from paged_infer.control.sequence import Sequence
from paged_infer.control.step import ScheduledSequence, ScheduledStep
from paged_infer.control.step_entries import sampling_row
from paged_infer.engine import build
from paged_infer.outputs import RequestOutput

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
KITES = r"(Mia|Leo) has \d{1,3} kites?\."
PROMPTS = ["A story about Mia and a kite", "Once upon a time", "Once upon a time there was", "A story", "There was"]


def asked(max_tokens: int = 60, temperature: float = 0.0, budget: int | None = None, **options: Any) -> SamplingParams:
    what = {name: options.pop(name) for name in ("json", "regex", "choice", "backend") if name in options}
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        thinking_token_budget=budget,
        structured_outputs=StructuredOutputsParams(**what) if what else None,
        **options,
    )


MIXED = [
    asked(json=PERSON),
    asked(30, 0.9, regex=KITES, n=3, seed=5),
    asked(20, seed=3),
    asked(choice=["yes", "no"], budget=4),
    asked(24, 0.9, 6, seed=8, n=2),
]


@pytest.fixture(scope="module", autouse=True)
def marked_by_a_word() -> Iterator[None]:
    """A parser for the storyteller: what it writes until somebody lived somewhere is its reasoning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REASONING_PARSERS, "lived", ReasoningFormat(b"<think>", b" lived", Part.REASONING))
        yield


def make(**options: Any) -> LLM:
    """The storyteller."""
    return LLM(**{"num_blocks": 200, "max_num_seqs": 16, "reasoning_parser": "lived", **options})


@pytest.fixture(scope="module")
def told() -> LLM:
    return make()


def said(outputs: list[RequestOutput]) -> list[Any]:
    return [
        (o.token_ids, o.text, o.finish_reason, o.num_reasoning_tokens) for output in outputs for o in output.outputs
    ]


def generate(llm: LLM, params: Any = MIXED, prompts: Any = PROMPTS) -> list[Any]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.check_integrity()
    assert llm.stats()["free_blocks"] == llm.stats()["num_blocks"]
    return said(outputs)


@pytest.fixture(scope="module")
def expected(told: LLM) -> list[Any]:
    return generate(told)


def content(text: str) -> str:
    return text.partition(" lived")[2]


def test_grammars_begin_after_the_reasoning(expected: list[Any]) -> None:
    _, text, reason, num_reasoning = expected[0]
    jsonschema.validate(json.loads(content(text)), PERSON)
    assert reason == "stop" and num_reasoning > 5
    for _, text, reason, _ in expected[1:4]:
        assert re.fullmatch(KITES, content(text)) if reason == "stop" else " lived" not in text
    assert sum(reason == "stop" for _, _, reason, _ in expected[1:4]) >= 2


def test_a_budget_forces_the_end_after_so_many_tokens(told: LLM, expected: list[Any]) -> None:
    (token_ids, text, _, num_reasoning) = expected[5]
    assert content(text) in ("yes", "no") and num_reasoning == 5
    assert token_ids[:4] == generate(told, asked(4), PROMPTS[3])[0][0]
    free = generate(told, asked(24, 0.9, seed=8, n=2), PROMPTS[4])
    for (ids, text, _, num), (without, _, _, num_free) in zip(expected[6:], free, strict=True):
        assert num == min(7, num_free) and " lived" in text
        assert (ids == without) == (num_free <= 7) and ids[:6] == without[:6]
    assert any(num_free > 7 for *_, num_free in free)
    (none,) = generate(told, asked(5, budget=0), PROMPTS[0])
    assert none[1].startswith(" lived") and none[3] == 1
    late = generate(told, asked(5, budget=100), PROMPTS[0])
    assert late == generate(told, asked(5), PROMPTS[0]) and late[0][3] == 5


def test_a_parser_changes_no_token_of_a_request_without_grammar_and_budget(told: LLM, expected: list[Any]) -> None:
    free = [asked(20, seed=3), asked(24, 0.9, seed=8, n=2)]
    plain = generate(make(reasoning_parser=None), free, [PROMPTS[2], PROMPTS[4]])
    assert [one[:3] for one in generate(told, free, [PROMPTS[2], PROMPTS[4]])] == [one[:3] for one in plain]
    assert expected[4][:3] == plain[0][:3]  # nor do its neighbours'
    assert {one[3] for one in plain} == {None}


SETTINGS: dict[str, dict[str, Any]] = {
    "one-by-one": {"max_num_seqs": 1},
    "chunks": {"max_num_batched_tokens": 5, "block_size": 4, "num_blocks": 400},
    "preempting": {"block_size": 1, "num_blocks": 106, "max_model_len": 100},
    "swapping": {"block_size": 1, "num_blocks": 106, "max_model_len": 100, "preemption_mode": "swap"},
    "async": {"async_scheduling": True},
    "ngram": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2}},
    "draft-model": {
        "speculative_config": {
            "method": "draft_model",
            "num_speculative_tokens": 3,
            "model": str(storyteller.DRAFT_PATH),
        }
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_tokens_are_the_same_however_the_steps_are_cut(name: str, expected: list[Any]) -> None:
    llm = make(**SETTINGS[name])
    assert generate(llm) == expected
    if name in ("preempting", "swapping"):
        assert llm.stats()["preemptions"] > 0


@pytest.mark.parametrize(
    ("name", "backend"),
    [("ngram", "native"), ("draft-model", "native"), ("ngram", "xgrammar"), ("draft-model", "llguidance")],
)
def test_every_document_is_valid_when_the_end_is_among_accepted_drafts(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "native":
        pytest.importorskip(backend)
    crossed = []
    append = Sequence.append_output_tokens

    def watched(self: Sequence, token_ids: Any) -> Any:
        assert self.reasoning is not None
        before, num_before = self.reasoning.has_ended, self.num_output_tokens
        added = append(self, token_ids)
        num_end = self.reasoning.num_reasoning_tokens
        if not before and self.reasoning.has_ended and num_end < num_before + added[0]:
            crossed.append(num_end)  # an accepted draft, as another token came behind it
        return added

    llm = make(**SETTINGS[name])
    openings = [f"A story about {who} and a" for who in ("Mia", "Leo", "Hugo", "Anna", "Clara", "Ben", "Tom", "Ivy")]
    encode = llm.engine.tokenizer.encode  # type: ignore[union-attr]
    told = make(reasoning_parser=None).generate(openings, asked(40), use_tqdm=False)
    prompts = [[*encode(o), *one.outputs[0].token_ids, 0, *encode(o)] for o, one in zip(openings, told, strict=True)]
    monkeypatch.setattr(Sequence, "append_output_tokens", watched)
    outputs = llm.generate(prompts, asked(110, json=PERSON, budget=70, backend=backend), use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs if output.outputs[0].finish_reason == "stop"]
    assert len(texts) == len(prompts) and len(crossed) >= 3, (texts, crossed)
    for text in texts:
        jsonschema.validate(json.loads(content(text)), PERSON)


def test_two_ranks_give_the_tokens_of_one(expected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and reasoning are on rank 0's scheduler; the ranks' results are compared in each step."""
    monkeypatch.setattr(build, "LoadedModels", ThreadsModels)
    llm = make(speculative_config=SETTINGS["ngram"]["speculative_config"])
    assert llm.engine.decoder.parallel.size == 2
    few = [0, 3, 4]
    params = [MIXED[0], MIXED[3], MIXED[4]]
    assert generate(llm, params, [PROMPTS[i] for i in few]) == [expected[0], *expected[5:]]


def test_a_step_is_planned_ahead_unless_its_tokens_decide_what_is_forbidden(told: LLM) -> None:
    for params, ahead in ((asked(9), True), (asked(9, budget=9), True), (asked(9, budget=1), False), (MIXED[0], False)):
        (request,) = told.prepare(PROMPTS[0], params)
        row = sampling_row(request.sequences[0])
        step = ScheduledStep(0, [ScheduledSequence(0, [5], 0, [0], row)])
        assert step.allows_async_scheduling == ahead
        assert row.is_masked == (params.structured_outputs is not None)  # reasoning must not end such an output


def test_three_clocks_are_in_order(told: LLM) -> None:
    (both,) = told.generate(PROMPTS[0], asked(20), use_tqdm=False)
    metrics = both.metrics
    assert metrics.ttft is not None and metrics.reasoning_time is not None and metrics.ttfc is not None
    assert metrics.latency is not None
    assert 0 < metrics.ttft < metrics.reasoning_time < metrics.ttfc < metrics.latency
    (unfinished,) = told.generate(PROMPTS[0], asked(3), use_tqdm=False)
    assert (unfinished.metrics.reasoning_time, unfinished.metrics.ttfc) == (None, None)
    (closed,) = told.generate("<think> Mia lived", asked(3), use_tqdm=False)  # in the prompt
    assert closed.metrics.reasoning_time is None and closed.metrics.ttfc == closed.metrics.ttft
    assert closed.outputs[0].num_reasoning_tokens == 0
    (plain,) = make(reasoning_parser=None).generate(PROMPTS[0], asked(3), use_tqdm=False)
    assert (plain.metrics.reasoning_time, plain.metrics.ttfc) == (None, None)


def test_a_stop_string_takes_back_the_end_of_the_reasoning(told: LLM) -> None:
    ((token_ids, text, reason, num_reasoning),) = generate(told, asked(30, stop=["lived"]), PROMPTS[0])
    assert reason == "stop" and " lived" not in text and num_reasoning == len(token_ids)


def test_baselines_give_the_same_tokens(told: LLM, expected: list[Any]) -> None:
    assert [one[:3] for one in said(generate_cached(told, PROMPTS, MIXED))] == [one[:3] for one in expected]


def test_beams_have_no_reasoning_and_no_budget(told: LLM) -> None:
    (output,) = told.beam_search(PROMPTS[0], BeamSearchParams(2, 12), use_tqdm=False)
    assert output.outputs[0].num_reasoning_tokens is None and output.metrics.ttfc is None
    with pytest.raises(TypeError, match="thinking_token_budget"):
        BeamSearchParams(2, 5, thinking_token_budget=3)  # type: ignore[call-arg]


def test_a_request_from_another_process_gets_its_matcher_there(told: LLM, expected: list[Any]) -> None:
    (request,) = told.prepare(PROMPTS[3], MIXED[3])
    sent = pickle.loads(pickle.dumps(request))
    assert sent.sequences[0].reasoning is None
    told.engine.submit(sent)
    outputs: list[RequestOutput] = []
    while not outputs:
        outputs = told.engine.step().outputs
    assert said(outputs) == [expected[5]]


def test_what_cannot_be_served_is_refused_by_name(told: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"reasoning_parser='r1': must be one of qwen3, deepseek_r1"):
        LLM(reasoning_parser="r1")
    with monkeypatch.context() as patch:
        patch.setattr(build.Tokenizer, "from_pretrained", lambda folder: None)
        with pytest.raises(ValueError, match="reasoning_parser='lived' needs text, but this checkpoint has no token"):
            make()
    assert SamplingParams(thinking_token_budget=-1).thinking_token_budget is None
    for wrong in (-2, 1.5, "5"):
        with pytest.raises(ValueError, match=f"thinking_token_budget={wrong!r}: must be an integer >= -1"):
            SamplingParams(thinking_token_budget=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="thinking_token_budget=3: needs the engine's option reasoning_parser"):
        make(reasoning_parser=None).generate(PROMPTS[0], asked(budget=3), use_tqdm=False)
    stop = told.engine.tokenizer.encode("Mia lived")[-1]  # type: ignore[union-attr]
    with pytest.raises(
        ValueError, match=r"thinking_token_budget=3 with min_tokens=9: stop_token_ids has a token of  lived"
    ):
        told.generate(PROMPTS[0], asked(budget=3, min_tokens=9, stop_token_ids=[stop]), use_tqdm=False)


def test_the_markers_of_qwen3_are_found_as_one_token(text_checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(text_checkpoint, tmp_path / "qwen3"))
    written = json.loads((folder / "tokenizer.json").read_text())
    for _ in range(2):  # two of the vocabulary's tokens make room
        written["model"]["vocab"].popitem(), written["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(written))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)
    llm = LLM(folder, num_blocks=100, reasoning_parser="qwen3")
    (end,) = llm.engine.input_processor.reasoning_parser.rest_of_end(0)  # type: ignore[union-attr]
    assert end == len(tokenizer) - 1
    params = asked(20, 1.0, 5, seed=1, choice=["yes", "no"])
    for prompt, begins in (("ab<think>", True), ("ab<think></think>", False), ("ab<think></think>cd<think>\n", True)):
        ((token_ids, text, reason, num_reasoning),) = generate(llm, params, prompt)
        assert reason == "stop" and (token_ids.count(end), num_reasoning) == ((1, 6) if begins else (0, 0))
        assert text.rpartition("</think>")[2] in ("yes", "no")
