"""An engine on two ranks gives one rank's tokens under preemption, swaps, sharing, speculation and beam search.

The ranks are threads of this process, so that many families take seconds; ``execution/test_multiprocess.py`` has
processes. Every rank's whole result is compared in every step, logprobs included, to the bit.
"""

from __future__ import annotations

from typing import Any

import pytest
from decoding import IDS
from ranks import ThreadsModels

from paged_infer import LLM, BeamSearchParams, SamplingParams
from paged_infer.engine import build

SHARED = IDS[:9]
PROMPTS = [[*SHARED, 7, 8, 7, 8], [*SHARED, 300], IDS, [*SHARED, 7, 8, 1, 2, 3], [40, 41] * 6]
PARAMS = [
    SamplingParams(max_tokens=9, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=9, temperature=1.3, top_k=40, seed=3, ignore_eos=True, logprobs=2),
    SamplingParams(max_tokens=7, temperature=0.9, seed=11, n=2, presence_penalty=0.5, ignore_eos=True),
    SamplingParams(max_tokens=5, temperature=0, prompt_logprobs=1, ignore_eos=True),
    SamplingParams(max_tokens=9, temperature=0, ignore_eos=True),
]
DENSE: dict[str, Any] = {"preemption_mode": "recompute"}
FAMILIES = {
    "gpt2": {"preemption_mode": "swap"},
    "llama3": {"preemption_mode": "swap", "kv_cache_dtype": "int8"},
    "olmo2": DENSE,
    "gemma2": DENSE,
    "phi3": {"preemption_mode": "swap", "quantization": "w4a16"},
    "gpt-oss": DENSE,
    "qwen2-moe": {"preemption_mode": "swap"},
    "deepseek3": DENSE,
}


def tokens(llm: LLM) -> tuple[list[list[list[int]]], list[list[int]]]:
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    beams = llm.beam_search([IDS[:6]], BeamSearchParams(beam_width=3, max_tokens=5))[0]
    assert llm.stats()["preemptions"] > 0
    llm.check_integrity()
    return [[one.token_ids for one in out.outputs] for out in outputs], [one.token_ids for one in beams.outputs]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_give_the_tokens_of_one_whatever_the_scheduler_does(family, make_llm, monkeypatch) -> None:
    options = {"num_blocks": 16, "block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 8, **FAMILIES[family]}
    options |= {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}
    expected = tokens(make_llm(family, **options))
    monkeypatch.setattr(build, "LoadedModels", ThreadsModels)
    ranks = make_llm(family, **options)
    assert ranks.engine.decoder.parallel.size == 2
    assert tokens(ranks) == expected
