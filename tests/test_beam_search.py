"""Beam search: the answers and scores of transformers, whatever becomes of the beams' blocks on the way."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from checkpoints import VOCAB

from paged_infer import LLM, BeamSearchParams, SamplingParams
from paged_infer.control.policies import Dynamic
from paged_infer.outputs import RequestOutput

NUM_NEW = 9
EARLY_STOPPING: tuple[Any, ...] = (False, True, "never")


def prompts_of(lengths: tuple[int, ...], seed: int = 7) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCAB) for _ in range(length)] for length in lengths]


PROMPTS = prompts_of((17, 1))
ENDS = tuple(range(2, VOCAB, 25))  # some beams end in nearly every search
FEW_ENDS = (3, 120, 404, 777)
Answers = list[tuple[list[int], float]]


def answers(output: RequestOutput) -> Answers:
    return [(beam.token_ids, pytest.approx(beam.score, rel=1e-5, abs=1e-4)) for beam in output.outputs]


@pytest.fixture(scope="module")
def expected(transformers_model: Callable[[str], Any]) -> Callable[..., Answers]:
    """What transformers' beam search answers to one prompt, best first, with its scores."""

    @cache
    def search(name: str, prompt: tuple[int, ...], params: BeamSearchParams, ends: tuple[int, ...]) -> Answers:
        ends = (() if params.ignore_eos else ends) + tuple(params.stop_token_ids)
        found = transformers_model(name).generate(
            torch.tensor([prompt]),
            num_beams=params.beam_width,
            num_return_sequences=params.beam_width,
            max_new_tokens=params.max_tokens,
            min_new_tokens=params.min_tokens or None,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            eos_token_id=list(ends) or -1,  # None would be the checkpoint's own
            pad_token_id=VOCAB,  # which nothing says, so that it can be told from an answer
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        if params.beam_width == 1:  # transformers decodes greedily then, and gives no score
            token_ids = found.sequences[0, len(prompt) :].tolist()
            logprobs = torch.cat(found.scores).log_softmax(-1)[range(len(token_ids)), token_ids]
            return [(token_ids, logprobs.sum().item() / len(token_ids) ** params.length_penalty)]
        rows = [[t for t in row if t != VOCAB] for row in found.sequences[:, len(prompt) :].tolist()]
        return list(zip(rows, found.sequences_scores.tolist(), strict=True))

    return lambda name, prompts, params, ends=(): [search(name, tuple(p), params, ends) for p in prompts]


def speaks(llm: LLM, ends: tuple[int, ...]) -> LLM:
    """The same model, ending at other tokens."""
    object.__setattr__(llm.engine.decoder.config, "eos_token_ids", ends)
    return llm


def is_idle(llm: LLM) -> bool:
    llm.check_integrity()
    return llm.stats()["free_blocks"] == llm.stats()["num_blocks"]


FAMILIES = ["gpt2", "llama3", "mistral", "qwen2-window", "qwen3", "deepseek2"]
END_SETS = {"ends-often": ENDS, "ends-seldom": FEW_ENDS, "never-ends": ()}
SEARCHES = [
    BeamSearchParams(*search) for search in product(range(1, 6), [NUM_NEW], (0.5, 1.0, 2.0, -1.0), EARLY_STOPPING)
]


@pytest.mark.parametrize(
    ("place", "family", "ends"),
    [
        pytest.param(place, family, END_SETS[ends], id=f"{family}-{ends}")
        for place, (family, ends) in enumerate(product(FAMILIES, END_SETS))
    ],
)
def test_answers_and_scores_are_those_of_transformers(place, family, ends, make_llm, expected) -> None:
    llm = speaks(make_llm(family), ends)
    for params in SEARCHES[place :: len(FAMILIES) * len(END_SETS)]:
        outputs = llm.beam_search(PROMPTS, params, use_tqdm=False)
        assert [answers(o) for o in outputs] == expected(family, PROMPTS, params, ends), params
    assert is_idle(llm)


# -- blocks that are forked, dropped, preempted, swapped and cached on the way -----------------------------------------

(STORY,) = prompts_of((40,), seed=11)
CROWD = [STORY[:17], STORY[:6], STORY[:17], STORY[5:18], STORY[:18]]
SEARCH = BeamSearchParams(4, NUM_NEW, 1.0, "never")
SAMPLED = SamplingParams(temperature=0.9, n=2, seed=5, max_tokens=9, ignore_eos=True)
GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
SETTINGS: dict[str, dict[str, Any]] = {
    "block-16": {"trace": True},
    "torch-block-1-chunk-7": {
        "attention_backend": "torch",
        "block_size": 1,
        "num_blocks": 400,
        "max_num_batched_tokens": 7,
    },
    "block-3-chunk-7": {"block_size": 3, "num_blocks": 200, "max_num_batched_tokens": 7},
    "block-3-chunk-3": {"block_size": 3, "num_blocks": 200, "max_num_batched_tokens": 3},
    "block-1-preempting": {"block_size": 1, "num_blocks": 110},
    "block-3-preempting": {"block_size": 3, "num_blocks": 36},
    "block-3-chunk-13-preempting": {"block_size": 3, "num_blocks": 36, "max_num_batched_tokens": 13},
    "block-16-preempting": {"block_size": 16, "num_blocks": 8},
    "block-1-swapping": {"block_size": 1, "num_blocks": 108, "preemption_mode": "swap"},
    "block-3-chunk-13-swapping": {
        "block_size": 3,
        "num_blocks": 36,
        "max_num_batched_tokens": 13,
        "preemption_mode": "swap",
    },
    "block-16-swapping": {"block_size": 16, "num_blocks": 8, "preemption_mode": "swap"},
    "block-3-swap-space-full": {
        "block_size": 3,
        "num_blocks": 36,
        "preemption_mode": "swap",
        "swap_space": 3 * 3 * 2 * 2 * 24 * 4 * 9 / 2**30,
    },
    "static": {"block_size": 3, "num_blocks": 36, "scheduling_policy": "static"},
    "dynamic": {"block_size": 3, "num_blocks": 60, "scheduling_policy": Dynamic(0.01, 3)},
    "prefill-first": {
        "block_size": 3,
        "num_blocks": 36,
        "scheduling_policy": "prefill_first",
        "scheduler_delay_factor": 0.5,
    },
}


def serve_together(llm: LLM) -> list[RequestOutput]:
    """The crowd's searches, a greedy and a sampled request between them, all at once."""
    pairs = [(prompt, SEARCH) for prompt in CROWD]
    pairs[1:1], pairs[4:4] = [(STORY[:11], GREEDY)], [(STORY[:17], SAMPLED)]
    for index, (prompt, params) in enumerate(pairs):
        llm.engine.add_request(f"r{index}", prompt, params)
    found: dict[str, RequestOutput] = {}
    while llm.engine.has_unfinished_requests:
        found.update((output.request_id, output) for output in llm.engine.step().outputs)
        llm.check_integrity()
    return [found[f"r{index}"] for index in range(len(pairs))]


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "not-caching"])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_blocks_chunks_preemption_and_neighbours_do_not_change_a_beam(options, caching, make_llm, expected) -> None:
    llm = speaks(make_llm("qwen3", max_num_seqs=24, enable_prefix_caching=caching, **options), ENDS)
    roomy = make_llm("qwen3")
    outputs = serve_together(llm)
    sampled, greedy = outputs.pop(4), outputs.pop(1)
    assert [answers(o) for o in outputs] == expected("qwen3", CROWD, SEARCH, ENDS)
    for output, params in ((greedy, GREEDY), (sampled, SAMPLED)):
        (alone,) = roomy.generate(output.prompt_token_ids, params, use_tqdm=False)
        assert [o.token_ids for o in output.outputs] == [o.token_ids for o in alone.outputs]
    stats = llm.stats()
    crowded = llm.engine.memory.num_blocks * llm.engine.memory.block_size <= 128
    if "max_num_batched_tokens" in options and caching:
        crowded = False  # so much is shared, and they come in so slowly, that all have room
    assert (stats["preemptions"] > 0) == crowded
    assert (stats["blocks_swapped_out"] > 0) == (crowded and options.get("preemption_mode") == "swap")
    assert (stats["blocks_copied"] > 0) == (llm.engine.memory.block_size > 1)
    assert is_idle(llm) and llm.engine.manager.swap.num_used == 0


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss", "deepseek3"])
def test_experts_and_latents_give_a_preempted_beam_the_answers_of_transformers(
    family, mode, make_llm, expected
) -> None:
    llm = speaks(make_llm(family, block_size=3, num_blocks=36, max_num_seqs=24, preemption_mode=mode), ENDS)
    outputs = serve_together(llm)
    del outputs[4], outputs[1]  # sampled and greedy
    assert [answers(o) for o in outputs] == expected(family, CROWD, SEARCH, ENDS)
    assert llm.stats()["preemptions"] > 0 and (llm.stats()["blocks_swapped_in"] > 0) == (mode == "swap")
    assert is_idle(llm)


# -- endings, and what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [
    BeamSearchParams(3, NUM_NEW, min_tokens=4),
    BeamSearchParams(2, NUM_NEW, stop_token_ids=(815, 637, 971), early_stopping=True),
    BeamSearchParams(3, NUM_NEW, stop_token_ids=range(4, VOCAB, 30), ignore_eos=True, early_stopping="never"),
    BeamSearchParams(2, 1),
], ids=["min_tokens", "stop_token_ids", "ignore_eos", "one-token"])  # fmt: skip
def test_endings_are_those_of_transformers(params, make_llm, expected) -> None:
    llm = speaks(make_llm("gpt2"), ENDS)
    outputs = llm.beam_search(PROMPTS, params, use_tqdm=False)
    assert [answers(o) for o in outputs] == expected("gpt2", PROMPTS, params, ENDS)
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else {*ENDS})
    for beam in (beam for output in outputs for beam in output.outputs):
        last = beam.token_ids[-1]
        assert beam.finish_reason == ("stop" if last in ends else "length")
        assert beam.stop_reason == (last if last in ends - {*ENDS} else None)
        assert beam.score == beam.cumulative_logprob / len(beam.token_ids) ** params.length_penalty


def test_an_output_is_like_that_of_generate_best_first(text_llm) -> None:
    (output,) = text_llm.beam_search("ab ba", BeamSearchParams(3, 6), use_tqdm=False)
    assert output.finished and output.prompt == "ab ba"
    assert [beam.index for beam in output.outputs] == [0, 1, 2]
    scores = [beam.score for beam in output.outputs]
    assert scores == sorted(scores, reverse=True)
    assert all(beam.text and beam.logprobs is None for beam in output.outputs)
    assert output.metrics.ttft <= output.metrics.latency
    assert output.metrics.num_generation_tokens == sum(len(beam.token_ids) for beam in output.outputs)
    assert text_llm.beam_search([], BeamSearchParams(2, 2)) == []


def test_each_prompt_may_have_parameters_of_its_own(make_llm, expected) -> None:
    llm, params = (speaks(make_llm("gpt2"), ENDS), [BeamSearchParams(4, 5), BeamSearchParams(2, 8)])
    outputs = llm.beam_search(PROMPTS, params, use_tqdm=False)
    for output, prompt, own in zip(outputs, PROMPTS, params, strict=True):
        assert [answers(output)] == expected("gpt2", [prompt], own, ENDS)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_an_aborted_search_frees_everything_wherever_it_is(mode, num_steps, make_llm, expected) -> None:
    llm = speaks(
        make_llm(
            "qwen3", block_size=3, num_blocks=36, max_num_seqs=24, max_num_batched_tokens=16, preemption_mode=mode
        ),
        ENDS,
    )
    for index, prompt in enumerate(CROWD):
        llm.engine.add_request(str(index), prompt, SEARCH)
    for _ in range(num_steps):
        llm.engine.step()
    aborted = [llm.engine.abort(str(index)) for index in range(1, 5)]
    assert all(beam.finish_reason == "abort" and beam.score is None for o in aborted for beam in o.outputs)
    llm.check_integrity()
    outputs = []
    while llm.engine.has_unfinished_requests:
        outputs += llm.engine.step().outputs
    assert [answers(o) for o in outputs] == expected("qwen3", CROWD[:1], SEARCH, ENDS)
    assert is_idle(llm) and llm.engine.manager.swap.num_used == 0


@pytest.mark.parametrize(
    ("params", "parts"),
    [
        ({"beam_width": 0}, ["beam_width=0", ">= 1"]),
        ({"beam_width": 2.0}, ["beam_width=2.0"]),
        ({"max_tokens": 0}, ["max_tokens=0", ">= 1"]),
        ({"max_tokens": None}, ["max_tokens=None"]),
        ({"length_penalty": float("nan")}, ["length_penalty=nan"]),
        ({"length_penalty": 11}, ["length_penalty=11", "<= 10"]),
        ({"early_stopping": "always"}, ["early_stopping='always'", "'never'"]),
        ({"early_stopping": 1}, ["early_stopping=1"]),
        ({"min_tokens": 6}, ["min_tokens=6", "[0, 5]"]),
        ({"stop_token_ids": [-1]}, ["stop_token_ids", "-1"]),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(params, parts) -> None:
    with pytest.raises(ValueError) as refusal:
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 5, **params})
    assert all(part in str(refusal.value) for part in parts), refusal.value


@pytest.mark.parametrize(
    ("params", "parts"),
    [
        (BeamSearchParams(9, 5), ["beam_width=9", "max_num_seqs=8"]),
        (BeamSearchParams(8, 200), ["8 sample(s) or beam(s)", "104 blocks", "num_blocks=64"]),
        (BeamSearchParams(2, 5, stop_token_ids=[VOCAB]), ["stop_token_ids", f"{VOCAB}"]),
        (BeamSearchParams(8, 5, stop_token_ids=range(200)), ["beam_width=8", "201 end", "1616", f"{VOCAB}"]),
        (SamplingParams(), ["beam_search_params", "BeamSearchParams"]),
        ([BeamSearchParams(2, 5)] * 2, ["2 beam_search_params for 1 prompt"]),
    ],
)
def test_a_search_that_cannot_be_served_is_refused_at_the_door(params, parts, llm) -> None:
    with pytest.raises(ValueError) as refusal:
        llm.beam_search([[5] * 5], params, use_tqdm=False)
    assert all(part in str(refusal.value) for part in parts), refusal.value
    with pytest.raises(ValueError, match="sampling_params"):
        llm.generate([[5]], BeamSearchParams(2, 5), use_tqdm=False)
    with pytest.raises(ValueError, match="streamed"):
        llm.engine.add_request("r", [5], BeamSearchParams(2, 5), streamed=True)


def test_what_sharing_saves_is_counted_in_blocks(make_llm) -> None:
    """Two samples of a prompt of 4 blocks: 5 places in tables for the prompt's end, 4 + 2 blocks; beams share more."""
    samples, beams, alone = (make_llm("qwen3", block_size=4, enable_prefix_caching=False) for _ in range(3))
    (prompt,) = prompts_of((16,))
    samples.generate(prompt, SamplingParams(n=2, max_tokens=4, ignore_eos=True), use_tqdm=False)
    # steps: the prompt, forked (4 blocks for 8), then three with one block of its own each (6 for 10)
    assert samples.stats()["sharing_saved"] == pytest.approx(1 - (4 + 3 * 6) / (8 + 3 * 10))
    beams.beam_search(prompt, BeamSearchParams(4, 24, ignore_eos=True), use_tqdm=False)
    assert 0.5 < beams.stats()["sharing_saved"] < 0.75  # four beams can save three quarters at most
    alone.generate(prompt, SamplingParams(max_tokens=4), use_tqdm=False)
    assert alone.stats()["sharing_saved"] == 0
