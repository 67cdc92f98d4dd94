"""An engine on two ranks gives one rank's tokens under preemption, swaps, sharing, speculation and beam search.

The ranks are threads of this process, so that many families take seconds; ``execution/test_multiprocess.py`` has
processes. Every rank's whole result is compared in every step, logprobs included, to the bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from decoding import IDS
from ranks import RankThreads

from paged_infer import LLM, BeamSearchParams, SamplingParams
from paged_infer.config import EngineConfig
from paged_infer.control.step import ScheduledStep, StepResult
from paged_infer.engine import build
from paged_infer.execution.executor import InProcessExecutor
from paged_infer.execution.loaded_models import LoadedModels


class Computed:
    def __init__(self, known: StepResult) -> None:
        self._known = known

    def result(self) -> StepResult:
        return self._known


class ThreadsExecutor(InProcessExecutor):
    """As an executor in process, to the engine: rank 0's. ``launch`` runs the step on all."""

    def __init__(self, threads: RankThreads, executors: list[InProcessExecutor]) -> None:
        super().__init__(executors[0].runner, executors[0].drafter)
        self._threads, self._executors = threads, executors

    def launch(self, step: ScheduledStep) -> Computed:
        results = self._threads.run(lambda parallel: self._executors[parallel.rank].launch(step).result())
        assert all(result == results[0] for result in results)
        return Computed(results[0])


class ThreadsModels:
    """``LoadedModels`` of two ranks."""

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        self._threads = RankThreads(2)
        self._models = self._threads.run(lambda parallel: LoadedModels(folder, config, parallel))
        self.memory = self._models[0].memory

    def executor(self) -> ThreadsExecutor:
        return ThreadsExecutor(self._threads, [models.executor() for models in self._models])


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
