"""Requests that fail: each ends with its own error, and every other one gets the tokens that it gets alone."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from effort import EFFORT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from paged_infer import LLM, BeamSearchParams, SamplingParams
from paged_infer.outputs import RequestOutput

POISON = 2  # its embedding is NaN: no request that holds it can go on
MODEL = "qwen3-untied"
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
KINDS: dict[str, Any] = {
    "greedy": GREEDY,
    "seeded": SamplingParams(seed=5, max_tokens=6, ignore_eos=True, top_p=0.9),
    "samples": SamplingParams(n=3, seed=7, max_tokens=5, ignore_eos=True),
    "penalised": SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=6, ignore_eos=True),
    "logprobs": SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1, max_tokens=4, ignore_eos=True),
    "tiny": SamplingParams(temperature=1e-20, repetition_penalty=1e-20, max_tokens=4, ignore_eos=True, seed=1),
    "beams": BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True),
}
SMALL = {"num_blocks": 24, "block_size": 3}
LOOKUP = {"method": "ngram", "num_speculative_tokens": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "recompute": {"num_blocks": 21, "block_size": 3, "max_num_batched_tokens": 8},
    "swap": {"num_blocks": 21, "block_size": 3, "max_num_batched_tokens": 8, "preemption_mode": "swap"},
    "ahead": {**SMALL, "async_scheduling": True},
    "drafts": {**SMALL, "speculative_config": LOOKUP},
    "static": {**SMALL, "scheduling_policy": "static", "max_num_batched_tokens": 512},
    "torch": {"attention_backend": "torch", "block_size": 4},
}


def poisoned(llm: LLM) -> LLM:
    with torch.no_grad():
        llm.engine.decoder.embedding.weight[POISON] = math.nan
    return llm


@pytest.fixture(scope="module")
def engines(make_llm) -> dict[str, LLM]:
    return {name: poisoned(make_llm(MODEL, max_model_len=48, **options)) for name, options in OPTIONS.items()}


@pytest.fixture
def poisoned_llm(make_llm) -> Iterator[LLM]:
    llm = poisoned(make_llm(MODEL))
    yield llm
    llm.check_integrity()
    assert llm.stats()["free_blocks"] == llm.stats()["num_blocks"]


def ids(output: RequestOutput) -> list[list[int]]:
    return [one.token_ids for one in output.outputs]


def reasons(output: RequestOutput) -> set[str | None]:
    return {one.finish_reason for one in output.outputs}


_ALONE: dict[tuple[Any, ...], list[list[int]]] = {}


def alone(engines: dict[str, LLM], prompt: tuple[int, ...], kind: str) -> list[list[int]]:
    """What a request of that kind gives where it is the only one."""
    if (prompt, kind) not in _ALONE:
        llm, params = engines["roomy"], KINDS[kind]
        run = llm.beam_search if kind == "beams" else llm.generate
        _ALONE[prompt, kind] = ids(run([list(prompt)], params, use_tqdm=False)[0])
    return _ALONE[prompt, kind]


@st.composite
def requests(draw: st.DrawFn) -> tuple[tuple[int, ...], str, int | None]:
    """A prompt that is poisoned or not, a kind, and the step before which it is aborted, if any."""
    length, first = draw(st.integers(1, 16)), draw(st.sampled_from([5, 6]))
    prompt = [first + i % 4 for i in range(length)]  # beginnings in common, and something to look up
    poison_at = draw(st.none() | st.integers(0, length - 1))
    if poison_at is not None:
        prompt[poison_at] = POISON
    return tuple(prompt), draw(st.sampled_from(sorted(KINDS))), draw(st.none() | st.integers(1, 9))


@pytest.mark.parametrize("name", sorted(OPTIONS))
@settings(max_examples=25 * EFFORT)
@given(batch=st.lists(requests(), min_size=1, max_size=6))
def test_failing_and_aborted_requests_change_no_token_of_the_others(engines, name, batch) -> None:
    engine = engines[name].engine
    for request_id in list(engine.requests.by_id):  # of an example that failed
        engine.abort(request_id)
    for number, (prompt, kind, _) in enumerate(batch):
        engine.add_request(str(number), list(prompt), KINDS[kind])
    outputs: dict[str, RequestOutput] = {}
    for step in range(1, 1000):
        for number, (_, _, abort_at) in enumerate(batch):
            if abort_at == step:
                engine.abort(str(number))
        outputs |= {output.request_id: output for output in engine.step().outputs}
        engine.check_integrity()
        if not engine.has_unfinished_requests:
            break
    stats = engine.stats()
    assert stats["free_blocks"] == stats["num_blocks"]
    for number, (prompt, kind, abort_at) in enumerate(batch):
        if str(number) not in outputs:
            assert abort_at is not None
        elif POISON in prompt:
            assert reasons(outputs[str(number)]) == {"error"}
            assert all("NaN" in one.error for one in outputs[str(number)].outputs)
        else:
            assert ids(outputs[str(number)]) == alone(engines, prompt, kind), (number, batch, outputs)
            assert all(one.error is None for one in outputs[str(number)].outputs)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_request_ends_with_its_own_error(poisoned_llm, kind) -> None:
    run = poisoned_llm.beam_search if kind == "beams" else poisoned_llm.generate
    good = run([[5, 6]], KINDS[kind], use_tqdm=False)[0]
    bad, other = run([[7, POISON, 8], [5, 6]], KINDS[kind], use_tqdm=False)
    assert reasons(bad) == {"error"} and bad.finished and bad.metrics.latency is not None
    assert all(f"request {bad.request_id!r}" in one.error for one in bad.outputs)
    assert ids(other) == ids(good)


def test_nan_that_was_cached_is_found_by_no_later_request(poisoned_llm) -> None:
    """Its logits are looked at only after its last chunk: by then several blocks of it are hashed."""
    prompt = [*range(10, 42), POISON, *range(50, 99)]
    for _ in range(2):
        (bad,) = poisoned_llm.generate([prompt], GREEDY, use_tqdm=False)
        assert reasons(bad) == {"error"} and bad.metrics.num_cached_tokens == 0
    good = prompt[:32] + [9] * 20
    want = poisoned_llm.generate([good], GREEDY, use_tqdm=False)[0]
    assert reasons(want) == {"length"}
    (bad,) = poisoned_llm.generate([prompt], GREEDY, use_tqdm=False)
    assert bad.metrics.num_cached_tokens == 32  # the beginning that is sound may be shared
    assert ids(poisoned_llm.generate([good], GREEDY, use_tqdm=False)[0]) == ids(want)


@pytest.mark.parametrize("aborted", ["stays", "aborted before", "aborted after"])
@pytest.mark.parametrize("comes", ["at once", "a step later"])
def test_a_block_shared_before_it_is_known_to_be_nan_costs_nobody_else(make_llm, aborted, comes) -> None:
    """One runs ahead here: a block is found in the cache while the step that fills it is still under way."""
    beginning = [*range(5, 13)]
    bad, good = [*beginning, POISON, 9], [*beginning, 20, 21]
    options = {"block_size": 4, "async_scheduling": True}
    want = ids(make_llm(MODEL, **options).generate([good], GREEDY, use_tqdm=False)[0])
    llm = poisoned(make_llm(MODEL, **options))
    engine, outputs = llm.engine, {}
    engine.add_request("bad", bad, GREEDY)
    if comes == "at once":
        engine.add_request("good", good, GREEDY)
    outputs |= {output.request_id: output for output in engine.step().outputs}
    if aborted == "aborted before":
        engine.abort("bad")
    if comes == "a step later":
        engine.add_request("good", good, GREEDY)
    if aborted == "aborted after":
        outputs |= {output.request_id: output for output in engine.step().outputs}
        engine.abort("bad")
    while engine.has_unfinished_requests:
        outputs |= {output.request_id: output for output in engine.step().outputs}
        engine.check_integrity()
    assert ids(outputs["good"]) == want and reasons(outputs["good"]) == {"length"}
    assert ids(llm.generate([good], GREEDY, use_tqdm=False)[0]) == want
    assert ("bad" in outputs) == (aborted != "aborted before")


def test_a_draft_that_is_nan_costs_its_sequence_no_token(make_llm, checkpoint) -> None:
    """It is never accepted, and what is computed with it, tokens before it included, may be NaN."""
    other = {"method": "draft_model", "model": str(checkpoint("qwen3")), "num_speculative_tokens": 2}
    llm, plain = make_llm(MODEL, speculative_config=other), make_llm(MODEL)
    want = ids(plain.generate([[5, 6]], GREEDY, use_tqdm=False)[0])
    drafted: list[int] = []
    fill_in = llm.engine.executor.drafter.fill_in

    def spy(step: Any) -> Any:
        filled = fill_in(step)
        drafted.extend(token for sequence in filled.sequences for token in sequence.drafts)
        return filled

    llm.engine.executor.drafter.fill_in = spy
    assert ids(llm.generate([[5, 6]], GREEDY, use_tqdm=False)[0]) == want
    fatal = next(token for token in drafted if token not in (5, 6, *want[0]))
    with torch.no_grad():
        llm.engine.decoder.embedding.weight[fatal] = math.nan
    drafted.clear()
    good, bad = llm.generate([[5, 6], [5, fatal]], GREEDY, use_tqdm=False)
    assert fatal in drafted and ids(good) == want and reasons(bad) == {"error"}
    llm.check_integrity()
    assert llm.stats()["free_blocks"] == llm.stats()["num_blocks"]


def test_a_stream_of_a_failing_request_ends_with_its_error(poisoned_llm) -> None:
    (only,) = poisoned_llm.stream([5, POISON], GREEDY)
    assert only.finished and reasons(only) == {"error"}


def test_a_sample_that_fails_ends_its_request_and_keeps_what_there_is(make_llm) -> None:
    llm = make_llm(MODEL)
    params = SamplingParams(n=2, seed=3, max_tokens=8, ignore_eos=True, logprobs=0)
    whole = ids(llm.generate([[5, 6]], params, use_tqdm=False)[0])
    fatal = next(token for token in whole[1][2:-1] if token not in {*whole[0][:-1], *whole[1][:2]})
    with torch.no_grad():
        llm.engine.decoder.embedding.weight[fatal] = math.nan
    failed = llm.generate([[5, 6]], params, use_tqdm=False)[0]
    assert reasons(failed) == {"error"}
    end = whole[1].index(fatal) + 1
    assert ids(failed) == [whole[0][:end], whole[1][:end]]
    assert [len(one.logprobs) for one in failed.outputs] == [end, end]
    llm.check_integrity()


@pytest.mark.parametrize("max_tokens", [1, 4])
def test_text_that_cannot_be_made_ends_its_own_request(text_llm, monkeypatch, max_tokens) -> None:
    prompts = ["ab ba", "cd dc"]
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, stop="zz")
    want = text_llm.generate(prompts[1], params, use_tqdm=False)[0].outputs[0].text
    request_ids = iter("01")
    submit = text_llm.engine.submit

    def submit_and_break_the_first(request: Any, **options: Any) -> None:
        submit(request, **options)
        if next(request_ids) == "0":
            (completion,) = text_llm.engine.requests.by_id[request.request_id].completions
            completion.advance = lambda *_: 1 / 0

    monkeypatch.setattr(text_llm.engine, "submit", submit_and_break_the_first)
    broken, sound = text_llm.generate(prompts, params, use_tqdm=False)
    assert reasons(broken) == {"error"} and "ZeroDivisionError" in broken.outputs[0].error
    assert reasons(sound) == {"length"} and sound.outputs[0].text == want


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("asked", [{}, {"logprobs": 1}, {"stop": "zz", "logprobs": 1}, {"prompt_logprobs": 1}])
def test_a_token_that_the_tokenizer_cannot_decode_ends_its_own_request(text_llm, monkeypatch, asked, streamed) -> None:
    """Some raise for ids that their vocabulary has not, and models have more rows than that."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, **asked)
    bad, good = text_llm.generate([[50, 60], [70, 80]], GREEDY, use_tqdm=False)
    fatal = next(token for token in bad.outputs[0].token_ids[2:] if token not in good.outputs[0].token_ids)
    hf_tokenizer = text_llm.tokenizer._hf
    decode = hf_tokenizer.decode

    def decode_or_raise(token_ids: list[int], **options: Any) -> str:
        if fatal in token_ids:
            raise IndexError("piece id is out of range")
        return decode(token_ids, **options)

    monkeypatch.setattr(hf_tokenizer, "decode", decode_or_raise)
    engine, outputs = text_llm.engine, {}
    engine.add_request("bad", [50, 60], params, streamed=streamed)
    engine.add_request("good", [70, 80], params)
    while engine.has_unfinished_requests:
        outputs |= {output.request_id: output for output in engine.step().outputs}
    assert reasons(outputs["bad"]) == {"error"} and "IndexError" in outputs["bad"].outputs[0].error
    assert outputs["good"].outputs[0].text == good.outputs[0].text
    with pytest.raises(ValueError, match="the prompt could not be decoded"):
        text_llm.generate([[50, fatal]], SamplingParams(stop="zz"), use_tqdm=False)


def with_a_large_head_row(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint in float16, one row of its head so large that its logits are beyond float16's 65,504."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        hidden = model.model(torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1]
        model.lm_head.weight[9] = hidden * (90_000 / hidden.square().sum())
    model.half().save_pretrained(folder)
    return folder


def test_a_logit_beyond_float16_is_the_most_probable_one_as_in_transformers(make_llm, checkpoint, tmp_path) -> None:
    folder = with_a_large_head_row(checkpoint(MODEL), tmp_path / "large")
    llm = make_llm(folder, dtype="float16")
    one_token = SamplingParams(temperature=0, max_tokens=1, logprobs=1)
    (output,) = llm.generate([[5, 6, 7]], one_token, use_tqdm=False)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    theirs = reference.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1, do_sample=False)[0, -1]
    assert reference(torch.tensor([[5, 6, 7]])).logits[0, -1, 9] == math.inf
    assert ids(output) == [[9]] == [[int(theirs)]]
    assert output.outputs[0].logprobs[0][9].logprob == 0.0
    sampled, neighbour = llm.generate([[5, 6, 7], [8, 8]], SamplingParams(seed=1, max_tokens=1), use_tqdm=False)
    assert reasons(sampled) == {"error"} and reasons(neighbour) == {"length"}


@pytest.mark.parametrize("run", ["generate", "stream"])
def test_calls_from_several_threads_give_the_tokens_of_calls_in_turn(make_llm, run) -> None:
    llm = make_llm(MODEL)
    prompts = [[5 + i, 6, 7 + i] for i in range(6)]
    want = [ids(llm.generate([prompt], GREEDY, use_tqdm=False)[0]) for prompt in prompts]
    got: dict[int, list[list[list[int]]]] = {}
    begin = threading.Barrier(len(prompts))

    def work(number: int) -> None:
        begin.wait()
        for _ in range(5):
            if run == "generate":
                output = llm.generate([prompts[number]], GREEDY, use_tqdm=False)[0]
            else:
                output = list(llm.stream(prompts[number], GREEDY))[-1]
            got.setdefault(number, []).append(ids(output))

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert got == {number: [tokens] * 5 for number, tokens in enumerate(want)}
    llm.check_integrity()
