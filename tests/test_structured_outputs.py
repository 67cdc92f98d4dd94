"""Structured outputs in the engine: valid, told how they ended, and the same whatever the steps and the company."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from effort import EFFORT
from random_schemas import random_schema
from ranks import ThreadsModels

from paged_infer import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams, storyteller
from paged_infer.baselines import generate_cached, generate_naive
from paged_infer.control.guided.grammar import GrammarError, NativeMatcher
from paged_infer.engine import build
from paged_infer.outputs import RequestOutput

MakeLLM = Callable[..., LLM]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "tags", "kind"],
    "additionalProperties": False,
}
PROMPTS = ["A story about Mia and a kite.", "Once upon a time", "Once upon a time there was", "A story"]


def asked(max_tokens: int = 60, temperature: float = 0.0, n: int = 1, seed: int = 0, **what: Any) -> SamplingParams:
    structured = StructuredOutputsParams(**what) if what else None
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, n=n, seed=seed, structured_outputs=structured)


MIXED = [
    asked(json=PERSON),
    asked(45, json=PERSON, temperature=0.9, n=3, seed=5),
    asked(20),
    asked(20, temperature=0.9, seed=3, regex=r"(Mia|Leo) has \d{1,3} (kites?|bells?)( and \d+ more)*\."),
]


def said(outputs: list[RequestOutput]) -> list[Any]:
    return [(one.token_ids, one.text, one.finish_reason) for output in outputs for one in output.outputs]


def generate(llm: LLM, params: Any = MIXED, prompts: Any = PROMPTS) -> list[Any]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.check_integrity()
    assert llm.stats()["free_blocks"] == llm.stats()["num_blocks"]
    return said(outputs)


@pytest.fixture(scope="module")
def told() -> LLM:
    """The storyteller."""
    return LLM(num_blocks=200, max_num_seqs=16)


@pytest.fixture(scope="module")
def expected(told: LLM) -> list[Any]:
    return generate(told)


def test_outputs_follow_their_grammars_and_have_their_finish_reason(expected: list[Any]) -> None:
    for _, text, reason in expected[:4]:
        assert reason == "stop"
        jsonschema.validate(json.loads(text), PERSON)
    assert expected[5][2] == "stop" and re.fullmatch(
        r"(Mia|Leo) has \d{1,3} (kites?|bells?)( and \d+ more)*\.", expected[5][1]
    )


def test_a_text_cut_in_the_middle_ends_with_length(told: LLM) -> None:
    ((token_ids, text, reason),) = generate(told, asked(5, json=PERSON), PROMPTS[0])
    assert len(token_ids) == 5 and reason == "length" and text == '{"name'
    ((_, text, reason),) = generate(told, asked(2, choice=["ab"]), PROMPTS[0])
    assert (text, reason) == ("ab", "stop")  # complete with its last token


def test_neighbours_without_a_grammar_are_not_changed_by_those_with_one(told: LLM, expected: list[Any]) -> None:
    assert expected[4] == generate(told, asked(20), PROMPTS[2])[0]
    seeded = asked(20, temperature=1.0, seed=9)
    alone = generate(told, seeded, PROMPTS[1])
    assert generate(told, [seeded, asked(json=PERSON), asked(choice=["yes", "no"])], PROMPTS[1:])[0] == alone[0]


def test_a_grammar_that_allows_everything_changes_no_token(told: LLM) -> None:
    for options in ({}, {"temperature": 0.8, "seed": 4, "n": 3}):
        free = generate(told, asked(30, **options))
        assert free == generate(told, asked(30, regex=r"[^\x00]*", **options))
        assert any(reason == "length" for _, _, reason in free)


NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2}
DRAFT = {"method": "draft_model", "num_speculative_tokens": 3, "model": str(storyteller.DRAFT_PATH)}
FEW_BLOCKS = {"block_size": 1, "num_blocks": 145, "max_model_len": 140}
HITS, PREEMPTED, SWAPPED, ACCEPTED = "prefix_hit_tokens", "preemptions", "blocks_swapped_in", "num_accepted_tokens"
# Options of the engine, and what it has to have counted.
SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "one-by-one": ({"max_num_seqs": 1}, ()),
    "chunks": ({"max_num_batched_tokens": 5, "block_size": 4, "num_blocks": 400}, (HITS,)),
    "preempting": (FEW_BLOCKS, (HITS, PREEMPTED)),
    "swapping": ({**FEW_BLOCKS, "preemption_mode": "swap"}, (HITS, PREEMPTED, SWAPPED)),
    "uncached": ({"enable_prefix_caching": False}, ()),
    "async": ({"async_scheduling": True}, ()),
    "ngram": ({"speculative_config": NGRAM}, (ACCEPTED,)),
    "draft-model": ({"speculative_config": DRAFT}, (ACCEPTED,)),
    "ngram-preempting": ({**FEW_BLOCKS, "speculative_config": NGRAM}, (HITS, PREEMPTED, ACCEPTED)),
    "draft-model-swapping": (
        {**FEW_BLOCKS, "preemption_mode": "swap", "speculative_config": DRAFT},
        (HITS, PREEMPTED, SWAPPED, ACCEPTED),
    ),
    "torch": ({"attention_backend": "torch"}, ()),
}


def made(name: str) -> LLM:
    return LLM(**{"num_blocks": 200, "max_num_seqs": 16, **SETTINGS[name][0]})


@pytest.mark.parametrize("name", SETTINGS)
def test_the_tokens_are_the_same_however_the_steps_are_cut(name: str, expected: list[Any]) -> None:
    llm = made(name)
    assert generate(llm) == expected
    assert generate(llm) == expected  # with prefix hits
    assert [what for what in SETTINGS[name][1] if not llm.stats()[what]] == []


@pytest.mark.parametrize("name", ["chunks", "preempting", "ngram"])  # a draft model is refused
def test_two_ranks_give_the_tokens_of_one(name: str, expected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank masks its own copy of the logits, and ``ThreadsExecutor`` compares their results in each step."""
    monkeypatch.setattr(build, "LoadedModels", ThreadsModels)
    llm = made(name)
    assert llm.engine.decoder.parallel.size == 2
    assert generate(llm) == expected
    counted = set(SETTINGS[name][1]) - {HITS}  # nothing came before
    assert [what for what in counted if not llm.stats()[what]] == []


def test_baselines_give_the_same_tokens(told: LLM, expected: list[Any]) -> None:
    assert said(generate_cached(told, PROMPTS, MIXED)) == expected
    assert said(generate_naive(told, PROMPTS[:1], MIXED[0])) == expected[:1]


def test_a_random_model_writes_valid_documents_too(text_checkpoint: Path, make_llm: MakeLLM) -> None:
    llm = make_llm(text_checkpoint, num_blocks=300)
    ends = 0
    for seed in range(12 if EFFORT == 1 else 100):
        schema = random_schema(seed)
        params = asked(70, temperature=1.0, seed=seed, json=schema)
        try:
            (output,) = llm.generate("x", params, use_tqdm=False)
        except ValueError:
            continue  # refused
        (one,) = output.outputs
        assert one.finish_reason in ("stop", "length")
        if one.finish_reason == "stop":
            ends += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(one.text))
    assert ends > 3


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({}, "exactly one of json, regex, choice and grammar is needed, not none"),
        ({"json": {}, "regex": "a"}, "is needed, not json, regex"),
        ({"json": "{"}, "json='{': is not valid JSON"),
        ({"json": '{"const": NaN}'}, "NaN is not a JSON value"),
        ({"json": {"const": {1, 2}}}, "is not valid JSON"),
        ({"json": [1]}, "a schema must be an object, or true"),
        ({"regex": ""}, "regex='': must be a str that is not empty"),
        ({"regex": 3}, "regex=3: must be a str"),
        ({"choice": "yes"}, "choice='yes': must be a list of str"),
        ({"choice": []}, "must be a list of str"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"regex": "a", "backend": "outlines"}, "backend='outlines': must be one of auto, native"),
        ({"grammar": "a", "backend": "native"}, "backend='native': only xgrammar and llguidance"),
    ],
)
def test_parameters_are_checked_by_name(what: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        StructuredOutputsParams(**what)


@pytest.mark.parametrize("options", [{"min_tokens": 1}, {"ignore_eos": True}, {"structured_outputs": {"regex": "a"}}])
def test_what_cannot_be_combined_with_a_grammar_is_refused(options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{"structured_outputs": StructuredOutputsParams(regex="a"), **options})


def test_beams_refuse_a_grammar_by_name() -> None:
    with pytest.raises(TypeError, match="structured_outputs"):
        BeamSearchParams(2, 5, structured_outputs=StructuredOutputsParams(regex="a"))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"json": {"type": "integer", "multipleOf": 2}, "backend": "native"}, "json: #: keyword 'multipleOf'"),
        ({"json": {"minLength": 2, "maxLength": 1}}, "json: #: nothing satisfies minLength=2 and maxLength=1"),
        ({"regex": "(a"}, "regex: '(a': missing )"),
        ({"regex": "(a|b)*a(a|b){20}"}, "it needs more than 4096 states"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_refused(told: LLM, what: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match="prompt 0: structured_outputs: .*" + re.escape(reason)):
        told.generate(PROMPTS, asked(**what), use_tqdm=False)
    told.check_integrity()


def test_without_a_tokenizer_a_grammar_is_refused(make_llm: MakeLLM) -> None:
    with pytest.raises(ValueError, match="checkpoint has no tokenizer"):
        make_llm("qwen3").generate([[5, 6]], asked(regex="a"), use_tqdm=False)


@pytest.mark.parametrize("place", ["mask", "accept"])
def test_a_grammar_that_breaks_ends_its_own_request_only(
    told: LLM, expected: list[Any], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = getattr(NativeMatcher, place)

    def breaking(self: NativeMatcher, *arguments: Any) -> Any:
        if len(self._states) == 4 and self._machine.is_broken:  # type: ignore[attr-defined]
            raise GrammarError("the grammar broke")
        return method(self, *arguments)

    monkeypatch.setattr(NativeMatcher, place, breaking)
    from paged_infer.control.guided.machine import Machine

    monkeypatch.setattr(Machine, "is_broken", False, raising=False)
    broken = asked(regex="aaaaaaaaaa+")
    grammar = told.engine.input_processor.grammars.get(broken.structured_outputs)  # type: ignore[arg-type]
    monkeypatch.setattr(grammar.machine, "is_broken", True, raising=False)  # type: ignore[attr-defined]
    outputs = told.generate([PROMPTS[0], *PROMPTS], [broken, *MIXED], use_tqdm=False)
    (failed,) = outputs[0].outputs
    assert failed.finish_reason == "error" and "the grammar broke" in (failed.error or "")
    assert said(outputs[1:]) == expected
    told.check_integrity()


def test_a_request_from_another_process_gets_its_grammar_there(told: LLM, expected: list[Any]) -> None:
    (request,) = told.prepare(PROMPTS[0], MIXED[0])
    sent = pickle.loads(pickle.dumps(request))
    assert sent.sequences[0].matcher is None and request.sequences[0].matcher is not None
    told.engine.submit(sent)
    outputs = []
    while not outputs:
        outputs = told.engine.step().outputs
    assert said(outputs) == expected[:1]


def test_grammars_are_kept_up_to_a_number(told: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from paged_infer.engine import grammars

    monkeypatch.setattr(grammars, "MAX_GRAMMARS", 2)
    cache = told.engine.input_processor.grammars
    first = cache.get(StructuredOutputsParams(regex="x1"))
    assert cache.get(StructuredOutputsParams(regex="x1")) is first
    for pattern in ("x2", "x3", "x4"):
        cache.get(StructuredOutputsParams(regex=pattern))
    assert cache.get(StructuredOutputsParams(regex="x1")) is not first


FOX = "Once upon a time there was a very little fox!"


@pytest.mark.parametrize("place", ["accept", "forced", "is_finished"])
def test_a_grammar_that_breaks_behind_accepted_drafts_ends_its_own_request_only(
    expected: list[Any], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came before stays, with its logprobs; drafts that cannot be had are none."""
    llm = LLM(num_blocks=200, max_num_seqs=16, **SETTINGS["ngram"][0])
    fox = StructuredOutputsParams(regex=FOX)
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=1, structured_outputs=fox)
    machine = llm.engine.input_processor.grammars.get(fox).machine  # type: ignore[attr-defined]
    original = getattr(NativeMatcher, place)

    def breaking(self: NativeMatcher, *arguments: Any) -> Any:
        if self._machine is machine and len(self._states) == 5:
            raise GrammarError("the grammar broke")
        return original.fget(self) if isinstance(original, property) else original(self, *arguments)

    monkeypatch.setattr(NativeMatcher, place, property(breaking) if isinstance(original, property) else breaking)
    outputs = llm.generate([PROMPTS[0], *PROMPTS], [params, *MIXED], use_tqdm=False)
    (one,) = outputs[0].outputs
    assert said(outputs[1:]) == expected
    assert one.logprobs is not None and len(one.logprobs) == len(one.token_ids) > 2
    if place == "forced":
        assert (one.text, one.finish_reason) == (FOX, "stop")
    else:
        assert one.finish_reason == "error" and "the grammar broke" in (one.error or "")
        assert FOX.startswith(one.text) and one.text != FOX
    llm.check_integrity()


def test_a_schema_that_is_nested_too_deep_for_a_thread_s_stack_is_refused(
    told: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paged_infer.engine import grammars

    def too_deep(*_: Any) -> None:
        raise RecursionError

    monkeypatch.setattr(grammars, "NativeGrammar", too_deep)
    with pytest.raises(ValueError, match="structured_outputs: regex: it is nested too deep"):
        told.engine.input_processor.grammars.get(StructuredOutputsParams(regex="never compiled"))
