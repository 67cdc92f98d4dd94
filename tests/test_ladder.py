"""Law 1, same tokens: every rung, backend, block size, chunk size and crowd says what transformers says."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, VOCAB
from effort import EFFORT, each_with_some

from paged_infer import SamplingParams
from paged_infer.baselines import generate_cached, generate_naive, generate_static
from paged_infer.control.policies import Dynamic

LENGTHS = (1, 2, 5, 17, 30, 41)  # around the windows (11, 13) and block sizes (1, 3, 16) that are used here
NUM_NEW = 14
RUNGS: dict[str, Callable[..., Any]] = {
    "naive": generate_naive,
    "cached": generate_cached,
    "static": generate_static,
    "static-by-4": lambda *args: generate_static(*args, batch_size=4),
    "paged": lambda llm, *args: llm.generate(*args, use_tqdm=False),
}
PAGED_SETTINGS: dict[str, dict[str, Any]] = {
    "torch": {"attention_backend": "torch"},
    "sdpa": {"attention_backend": "sdpa"},
    "sdpa-block-3-chunk-7": {"attention_backend": "sdpa", "block_size": 3, "max_num_batched_tokens": 7},
    "torch-block-3-chunk-7": {"attention_backend": "torch", "block_size": 3, "max_num_batched_tokens": 7},
    "block-1": {"block_size": 1, "num_blocks": 400},
    "block-3-chunk-7": {"block_size": 3, "num_blocks": 200, "max_num_batched_tokens": 7},
    "chunk-64": {"max_num_batched_tokens": 64},
    "two-at-a-time": {"max_num_seqs": 2},
    "block-1-preempting": {"block_size": 1, "num_blocks": 60},
    "block-3-preempting": {"block_size": 3, "num_blocks": 22},
    "ahead": {"async_scheduling": True},
    "ahead-block-3-chunk-7": {
        "async_scheduling": True,
        "block_size": 3,
        "num_blocks": 200,
        "max_num_batched_tokens": 7,
    },
    "ahead-block-1-preempting": {"async_scheduling": True, "block_size": 1, "num_blocks": 60},
    "ahead-block-3-swapping": {"async_scheduling": True, "block_size": 3, "num_blocks": 22, "preemption_mode": "swap"},
    "block-16-preempting": {"block_size": 16, "num_blocks": 4},
    "torch-block-3-chunk-7-preempting": {
        "attention_backend": "torch",
        "block_size": 3,
        "num_blocks": 20,
        "max_num_batched_tokens": 7,
    },
}


def prompts_of(lengths: tuple[int, ...] = LENGTHS, seed: int = 7) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCAB) for _ in range(length)] for length in lengths]


def tokens(outputs: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(transformers_model: Callable[[str], Any]) -> Callable[..., list[list[int]]]:
    """What transformers' greedy ``generate`` says to each prompt alone."""

    @cache
    def generate(name: str, prompt: tuple[int, ...]) -> list[int]:
        ids = torch.tensor([prompt])
        said = transformers_model(name).generate(ids, max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0)
        return said[0, len(prompt) :].tolist()

    return lambda name, prompts=None: [generate(name, tuple(p)) for p in prompts or prompts_of()]


GREEDY = SamplingParams(temperature=0, max_tokens=NUM_NEW)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rung_gives_the_greedy_tokens_of_transformers(family, make_llm, expected) -> None:
    llm = make_llm(family)
    for name, rung in RUNGS.items():
        assert tokens(rung(llm, prompts_of(), GREEDY)) == expected(family), name
    assert len({tuple(t) for t in expected(family)}) == len(LENGTHS)  # else equality would prove little


@pytest.mark.parametrize(("family", "options"), each_with_some(FAMILIES, PAGED_SETTINGS, whole="qwen3"))
def test_backend_block_size_chunks_and_preemption_do_not_change_a_greedy_token(
    family, options, make_llm, expected
) -> None:
    llm = make_llm(family, **options)
    assert tokens(llm.generate(prompts_of(), GREEDY, use_tqdm=False)) == expected(family)
    if options.get("num_blocks", 64) <= 60:
        assert llm.stats()["preemptions"] > 0
    llm.check_integrity()
    assert llm.stats()["free_blocks"] == llm.stats()["num_blocks"]


# By default a window, and MLA with experts: the interpreter is slow, and the kernels have tests of their own.
@pytest.mark.parametrize("family", ["mistral", "deepseek3", *(["qwen3", "gpt2", "qwen2-moe"] if EFFORT > 1 else [])])
def test_the_kernels_give_the_tokens_of_torch_on_a_mixed_batch_with_a_cached_prefix(family, make_llm) -> None:
    """Decodes beside chunks of 6 that find the beginning of their prompt in the cache; greedy and sampled rows."""
    (long,) = prompts_of((17,))
    prompts = [long[:9], *prompts_of((2,), seed=8), long]
    params = [
        SamplingParams(temperature=0, max_tokens=5),
        SamplingParams(temperature=0.8, seed=3, max_tokens=7),
        SamplingParams(temperature=0.8, seed=4, max_tokens=3, top_k=20),
    ]
    triton, torch = (
        make_llm(family, attention_backend=backend, max_num_batched_tokens=6, block_size=3).generate(
            prompts, params, use_tqdm=False
        )
        for backend in ("triton", "torch")
    )
    assert tokens(triton) == tokens(torch)
    assert triton[2].metrics.num_cached_tokens >= 6


# -- sharing --------------------------------------------------------------------------------------------------------

(STORY,) = prompts_of((40,), seed=11)
SHARING = [STORY, STORY[:33], STORY, STORY[:9], STORY[:20] + STORY[:12], STORY[1:30], STORY[:33], STORY[:16]]
SHARING_SETTINGS: dict[str, dict[str, Any]] = {
    "block-16": {},
    "block-3-chunk-64": {"block_size": 3, "num_blocks": 200, "max_num_batched_tokens": 64},
    "block-3-chunk-7": {"block_size": 3, "num_blocks": 200, "max_num_batched_tokens": 7},
    "block-1-chunk-7-evicting": {"block_size": 1, "num_blocks": 58, "max_num_batched_tokens": 7},
    "block-3-evicting": {"block_size": 3, "num_blocks": 20},
    "block-16-evicting": {"block_size": 16, "num_blocks": 4, "max_num_batched_tokens": 64},
    "block-1-chunk-7-swapping": {
        "block_size": 1,
        "num_blocks": 58,
        "max_num_batched_tokens": 7,
        "preemption_mode": "swap",
    },
    "block-3-chunk-64-swapping": {
        "block_size": 3,
        "num_blocks": 20,
        "max_num_batched_tokens": 64,
        "preemption_mode": "swap",
    },
    "static-swapping": {"block_size": 3, "num_blocks": 20, "preemption_mode": "swap", "scheduling_policy": "static"},
    "prefill-first": {
        "block_size": 3,
        "num_blocks": 20,
        "scheduling_policy": "prefill_first",
        "scheduler_delay_factor": 0.5,
    },
    "dynamic": {"block_size": 3, "num_blocks": 200, "scheduling_policy": Dynamic(0.01, 3)},
    "block-16-swapping": {"block_size": 16, "num_blocks": 4, "preemption_mode": "swap"},
}


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "not-caching"])
@pytest.mark.parametrize("options", SHARING_SETTINGS.values(), ids=SHARING_SETTINGS)
@pytest.mark.parametrize("family", ["gpt2", "qwen2-window", "qwen3-moe", "deepseek2-yarn"])
def test_shared_beginnings_do_not_change_a_greedy_token(family, options, caching, make_llm, expected) -> None:
    llm = make_llm(family, enable_prefix_caching=caching, **options)
    for _ in range(2):  # the second time, much of it is there already
        outputs = llm.generate(SHARING, GREEDY, use_tqdm=False)
        assert tokens(outputs) == expected(family, SHARING)
        llm.check_integrity()
    cached = [output.metrics.num_cached_tokens for output in outputs]
    assert all(num < len(prompt) for num, prompt in zip(cached, SHARING, strict=True))
    assert (max(cached) > 0) == (llm.stats()["prefix_hit_tokens"] > 0) == caching
    tiny = llm.engine.memory.num_blocks * llm.engine.memory.block_size < 65
    assert (llm.stats()["evictions"] > 0) == (caching and tiny)
    assert (llm.stats()["preemptions"] > 0) == tiny
    assert (llm.stats()["blocks_swapped_out"] > 0) == (options.get("preemption_mode") == "swap")


def test_end_tokens_of_the_checkpoint_end_every_rung_as_they_end_transformers(make_llm, transformers_model) -> None:
    llm = make_llm("llama3")
    decoder_config, unended = llm.engine.decoder.config, llm.generate(prompts_of(), GREEDY, use_tqdm=False)
    ends = [tokens(unended)[0][4], tokens(unended)[1][2]]  # two that are sure to be said, one of them twice
    object.__setattr__(decoder_config, "eos_token_ids", tuple(ends))
    want = []
    for prompt in prompts_of():
        said = transformers_model("llama3").generate(
            torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=ends, pad_token_id=0
        )
        want.append(said[0, len(prompt) :].tolist())
    assert len(want[0]) == 5 and len(want[1]) == 3
    for name, rung in RUNGS.items():
        outputs = rung(llm, prompts_of(), GREEDY)
        assert tokens(outputs) == want, name
        assert [o.outputs[0].finish_reason for o in outputs] == [
            "stop" if len(t) < NUM_NEW or t[-1] in ends else "length" for t in want
        ]


# -- seeded samples -------------------------------------------------------------------------------------------------

SEEDED = SamplingParams(temperature=0.8, seed=1234, max_tokens=24, ignore_eos=True)
NEIGHBOURS = [
    SamplingParams(temperature=1.3, seed=1, max_tokens=30, repetition_penalty=1.4, frequency_penalty=0.7),
    SamplingParams(temperature=0.5, seed=2, max_tokens=9, top_p=0.4, presence_penalty=-1.0),
    SamplingParams(temperature=0, max_tokens=25, logit_bias={5: 100.0}),
    SamplingParams(temperature=2.0, seed=4, max_tokens=21, top_k=7, min_p=0.01, min_tokens=6),
    SamplingParams(temperature=1.0, seed=5, max_tokens=40, logprobs=3, ignore_eos=True),
    SamplingParams(temperature=0.9, n=2, max_tokens=18, prompt_logprobs=1),
]


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gpt2", "qwen3-moe", "deepseek3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_backend": "torch", "block_size": 3, "num_blocks": 200, "max_num_batched_tokens": 7},
        {"block_size": 4, "num_blocks": 25},
    ],
    ids=["roomy", "torch-block-3-chunk-7", "preempting"],
)
def test_a_seeded_sample_does_not_change_with_its_neighbours(family, options, make_llm) -> None:
    prompt, *others = prompts_of((23, 11, 30, 2, 19, 7, 12))
    alone = make_llm(family).generate(prompt, SEEDED, use_tqdm=False)[0]
    assert len(set(alone.outputs[0].token_ids)) > 5

    llm = make_llm(family, **options)
    for place in (0, 3, 6):  # first, in the middle, last: the youngest is the one that is preempted
        prompts, params = list(others), list(NEIGHBOURS)
        prompts.insert(place, prompt)
        params.insert(place, SEEDED)
        output = llm.generate(prompts, params, use_tqdm=False)[place]
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids
    if options.get("num_blocks") == 25:
        assert output.metrics.num_preemptions > 0


@pytest.mark.parametrize("family", ["llama3", "qwen2-window"])
def test_seeded_samples_are_the_same_on_every_rung(family, make_llm) -> None:
    llm = make_llm(family)
    prompts = prompts_of((9, 3, 20, 14, 6, 17))
    params = [SEEDED, *NEIGHBOURS[:4], SamplingParams(temperature=0.9, n=3, seed=-8, max_tokens=12)]
    want = [[sample.token_ids for sample in o.outputs] for o in generate_naive(llm, prompts, params)]
    assert len({tuple(ids) for ids in want[-1]}) == 3
    for name, rung in RUNGS.items():
        outputs = rung(llm, prompts, params)
        assert [[sample.token_ids for sample in o.outputs] for o in outputs] == want, name


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "not-caching"])
@pytest.mark.parametrize("options", SHARING_SETTINGS.values(), ids=SHARING_SETTINGS)
def test_forked_samples_are_those_that_are_computed_alone(options, caching, make_llm, sampled_alone) -> None:
    prompts, params, want = sampled_alone
    llm = make_llm("qwen3", enable_prefix_caching=caching, **options)
    for _ in range(2):
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [[sample.token_ids for sample in o.outputs] for o in outputs] == want
        llm.check_integrity()
    assert (llm.stats()["blocks_copied"] > 0) == (llm.engine.memory.block_size > 1)


@pytest.fixture(scope="module")
def sampled_alone(make_llm) -> tuple[list[list[int]], list[SamplingParams], list[list[list[int]]]]:
    """Prompts with shared beginnings, several samples of each, and what they say one by one and without a cache."""
    prompts = [STORY[:17], STORY[:6], STORY[:17], STORY[5:18]]
    params = [
        SamplingParams(temperature=0.9, n=n, seed=seed, max_tokens=9, ignore_eos=True)
        for seed, n in enumerate((2, 3, 1, 2))
    ]
    outputs = generate_naive(make_llm("qwen3"), prompts, params)
    return prompts, params, [[sample.token_ids for sample in output.outputs] for output in outputs]


def test_requests_without_a_seed_are_reproducible_per_engine_and_differ_from_each_other(make_llm) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=8)
    first, again, other = (
        tokens(make_llm(seed=seed).generate([[5, 6]] * 3, params, use_tqdm=False)) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    assert len({tuple(ids) for ids in first}) == 3


def test_a_static_batch_may_reach_beyond_the_position_table_on_its_padded_rows(make_llm) -> None:
    """A long prompt ends early; its row goes on, idle, while a short one beside it uses the whole context."""
    llm = make_llm("gpt2")  # a table of 512 positions
    prompts = prompts_of((505, 3))
    params = [SamplingParams(temperature=0, max_tokens=2), SamplingParams(temperature=0, max_tokens=20)]
    outputs = generate_static(llm, prompts, params)
    assert tokens(outputs) == tokens(generate_cached(llm, prompts, params))
