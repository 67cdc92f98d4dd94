"""The ladder's baselines, each as one call: a workload in; tokens, times and costs out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from paged_infer import baselines
from paged_infer.bench.metrics import Run, System, TokenTimes
from paged_infer.bench.workloads import Workload
from paged_infer.cache.spec import kv_bytes_per_token
from paged_infer.engine.kv_usage import KVUsage
from paged_infer.llm import LLM
from paged_infer.outputs import RequestOutput


def our_baselines(llm: LLM) -> dict[str, System]:
    """naive, cached, static and paged on the weights of ``llm``."""

    def baseline(generate: Callable[..., list[RequestOutput]]) -> System:
        def run(workload: Workload) -> Run:
            usage = KVUsage()
            start = time.perf_counter()
            outputs = generate(llm, workload.prompts, workload.params, usage=usage)
            return _run(llm, outputs, time.perf_counter() - start, usage)

        return run

    runs = itertools.count()

    def paged(workload: Workload) -> Run:
        llm.engine.reset_stats()
        salt = f"run {next(runs)}"  # no prefix of an earlier run is found in the cache
        start = time.perf_counter()
        outputs = llm.generate(workload.prompts, workload.params, use_tqdm=False, cache_salt=salt)
        return _run(llm, outputs, time.perf_counter() - start, llm.engine.usage)

    return {
        "naive": baseline(baselines.generate_naive),
        "cached": baseline(baselines.generate_cached),
        "static": baseline(baselines.generate_static),
        "paged": paged,
    }


def _run(llm: LLM, outputs: list[RequestOutput], seconds: float, usage: KVUsage) -> Run:
    token_ids = [output.outputs[0].token_ids for output in outputs]
    return Run(
        token_ids,
        [_first_and_last(output) for output in outputs],
        seconds,
        usage,
        kv_bytes_per_token(llm.engine.decoder.kv_spec()),
    )


def _first_and_last(output: RequestOutput) -> TokenTimes:
    first, last = output.metrics.first_token_time_s, output.metrics.finished_time_s
    assert first is not None and last is not None
    return TokenTimes(
        output.metrics.arrival_time_s,
        len(output.prompt_token_ids),
        [first, last],
        num_output=len(output.outputs[0].token_ids),
    )
