"""The ladder's baselines, each as one call: a workload in; tokens, times and costs out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial

from paged_infer import baselines
from paged_infer.bench.metrics import Run, System, TokenTimes
from paged_infer.bench.workloads import Workload
from paged_infer.cache.spec import kv_bytes_per_token
from paged_infer.engine.kv_usage import KVUsage
from paged_infer.llm import LLM
from paged_infer.outputs import RequestOutput
from paged_infer.params import SamplingParams

_RUNS = itertools.count()


def our_baselines(llm: LLM) -> dict[str, System]:
    """naive, cached, static and paged on the weights of ``llm``."""
    systems: dict[str, Callable[..., list[RequestOutput]]] = {
        "naive": baselines.generate_naive,
        "cached": baselines.generate_cached,
        "static": baselines.generate_static,
        "paged": _generate_paged,
    }
    return {name: partial(_run, llm, generate) for name, generate in systems.items()}


def _generate_paged(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams], *, usage: KVUsage
) -> list[RequestOutput]:
    """``usage`` is the engine's, which records into it by itself."""
    salt = f"run {next(_RUNS)}"  # no prefix of an earlier run is found in the cache
    return llm.generate(prompts, params, use_tqdm=False, cache_salt=salt)


def _run(llm: LLM, generate: Callable[..., list[RequestOutput]], workload: Workload) -> Run:
    llm.engine.reset_stats()
    usage = llm.engine.usage
    start = time.perf_counter()
    outputs = generate(llm, workload.prompts, workload.params, usage=usage)
    seconds = time.perf_counter() - start
    token_ids = [output.outputs[0].token_ids for output in outputs]
    times = []
    for output, ids in zip(outputs, token_ids, strict=True):
        first, last = output.metrics.first_token_time_s, output.metrics.finished_time_s
        assert first is not None and last is not None
        num_prompt = len(output.prompt_token_ids)
        times.append(TokenTimes(output.metrics.arrival_time_s, num_prompt, [first, last], num_output=len(ids)))
    return Run(token_ids, times, seconds, usage, kv_bytes_per_token(llm.engine.decoder.kv_spec()))
