"""A quantised model gives the same tokens in every baseline, in chunks, in a small pool and under preemption."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import VOCAB

from paged_infer import LLM, SamplingParams
from paged_infer.baselines import generate_cached, generate_naive, generate_static

SMALL = {"num_blocks": 24, "block_size": 4, "max_num_seqs": 5, "max_num_batched_tokens": 24}
SETTINGS = {
    "recomputed": SMALL,
    "swapped": {**SMALL, "preemption_mode": "swap"},
    "drafts": {
        **SMALL,
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
    },
    "prefills first": {**SMALL, "scheduling_policy": "prefill_first", "max_num_batched_tokens": 96},
}
ROOMY = {"num_blocks": 256, "max_num_seqs": 1, "enable_prefix_caching": False}


def workload(seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, VOCAB, rng.integers(1, 30)).tolist() for _ in range(7)]
    prompts[4] = prompts[3] + prompts[4][:5]  # a common prefix
    params = [
        SamplingParams(max_tokens=int(rng.integers(2, 20)), temperature=float(i % 2), seed=i, ignore_eos=True)
        for i in range(7)
    ]
    return prompts, params


def tokens(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(("family", "scheme"), [("qwen3", "w8a16"), ("mistral", "w4a16"), ("qwen3", "w8a8")])
def test_a_crowded_engine_gives_the_tokens_of_a_roomy_one(family, scheme, checkpoint) -> None:
    prompts, params = workload(7)
    roomy = LLM(checkpoint(family), quantization=scheme, **ROOMY)
    expected = [tokens(roomy.generate([p], one, use_tqdm=False))[0] for p, one in zip(prompts, params, strict=True)]
    preemptions = 0
    for options in SETTINGS.values():
        crowded = LLM(checkpoint(family), quantization=scheme, **options)
        assert tokens(crowded.generate(prompts, params, use_tqdm=False)) == expected
        crowded.check_integrity()
        preemptions += crowded.stats()["preemptions"]
    assert preemptions > 0


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_naive_cached_static_and_paged_give_the_same_tokens(family, scheme, checkpoint) -> None:
    llm = LLM(checkpoint(family), quantization=scheme, num_blocks=64)
    prompts, greedy = workload(3)[0][:4], SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    expected = tokens(llm.generate(prompts, greedy, use_tqdm=False))
    for generate in (generate_naive, generate_cached, generate_static):
        assert tokens(generate(llm, prompts, greedy)) == expected
