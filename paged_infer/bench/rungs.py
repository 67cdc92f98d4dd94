"""The ladder's rungs, and transformers beside them, each as one call: a workload in, tokens and costs out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from paged_infer import baselines
from paged_infer.bench.workloads import Workload
from paged_infer.cache.spec import kv_bytes_per_token
from paged_infer.control.usage import KVUsage
from paged_infer.llm import LLM
from paged_infer.outputs import RequestOutput


@dataclass(frozen=True, slots=True)
class RungResult:
    """One run of one rung. Times in seconds.

    ``kv_fill`` is the share of KV bytes in use that hold tokens, over all steps; None where no KV is kept.
    """

    token_ids: list[list[int]]
    seconds: float
    ttft_s: float  # median over the requests
    peak_kv_bytes: int
    kv_fill: float | None

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids in self.token_ids)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


Rung = Callable[[Workload], RungResult]


def our_rungs(llm: LLM) -> dict[str, Rung]:
    """naive, cached, static and paged on the weights of ``llm``."""

    def baseline(generate: Callable[..., list[RequestOutput]]) -> Rung:
        def run(workload: Workload) -> RungResult:
            usage = KVUsage()
            start = time.perf_counter()
            outputs = generate(llm, workload.prompts, workload.params, usage=usage)
            return _result(llm, outputs, time.perf_counter() - start, usage)

        return run

    runs = itertools.count()

    def paged(workload: Workload) -> RungResult:
        llm.engine.usage = KVUsage()
        salt = f"run {next(runs)}"  # what an earlier run of the same prompts left in the prefix cache is no merit
        start = time.perf_counter()
        outputs = llm.generate(workload.prompts, workload.params, use_tqdm=False, cache_salt=salt)
        return _result(llm, outputs, time.perf_counter() - start, llm.engine.usage)

    return {
        "naive": baseline(baselines.generate_naive),
        "cached": baseline(baselines.generate_cached),
        "static": baseline(baselines.generate_static),
        "paged": paged,
    }


def _result(llm: LLM, outputs: list[RequestOutput], seconds: float, usage: KVUsage) -> RungResult:
    firsts = [output.metrics.ttft for output in outputs if output.metrics.ttft is not None]
    return RungResult(
        token_ids=[output.outputs[0].token_ids for output in outputs],
        seconds=seconds,
        ttft_s=median(firsts),
        peak_kv_bytes=usage.peak_slots * kv_bytes_per_token(llm.engine.decoder.kv_spec()),
        kv_fill=usage.fill if usage.slot_steps else None,
    )


def transformers_rungs(llm: LLM) -> dict[str, Rung]:
    """transformers' ``generate`` on the same checkpoint: requests one after the other, and in one left-padded batch."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading; a bench shows its own
    engine = llm.engine
    model = AutoModelForCausalLM.from_pretrained(
        llm.folder, dtype=engine.decoder.dtype, local_files_only=True
    )
    model = model.to(engine.device).eval()
    per_token = kv_bytes_per_token(engine.decoder.kv_spec())

    def one_by_one(workload: Workload) -> RungResult:
        return _run_transformers(model, workload, batch_size=1, kv_bytes_per_token=per_token)

    def static(workload: Workload) -> RungResult:
        return _run_transformers(model, workload, len(workload.prompts), kv_bytes_per_token=per_token)

    return {"transformers": one_by_one, "transformers static": static}


@torch.inference_mode()
def _run_transformers(model: Any, workload: Workload, batch_size: int, kv_bytes_per_token: int) -> RungResult:
    """A row that is done is filled up until its batch ends; what it should have given is cut out afterwards."""
    usage, tokens, firsts = KVUsage(), [], []
    start = time.perf_counter()
    for first in range(0, len(workload.prompts), batch_size):
        prompts = workload.prompts[first : first + batch_size]
        params = workload.params[first : first + batch_size]
        width, limits = max(map(len, prompts)), [p.max_tokens or 0 for p in params]
        watch = _StepWatch(prompts, limits, usage)
        ends = [] if params[0].ignore_eos else _end_tokens(model)
        generated = model.generate(
            torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device),
            attention_mask=torch.tensor(
                [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device
            ),
            max_new_tokens=max(limits),
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=0,
            stopping_criteria=[watch],
        )
        firsts += [watch.first_token_time_s - start] * len(prompts)
        for row, limit in zip(generated[:, width:].tolist(), limits, strict=True):
            tokens.append(_until_end(row[:limit], ends))
    seconds = time.perf_counter() - start
    return RungResult(tokens, seconds, median(firsts), usage.peak_slots * kv_bytes_per_token, usage.fill)


class _StepWatch:
    """A stopping criterion that never stops: it sees every step, so it knows when, and what the cache holds."""

    def __init__(self, prompts: list[list[int]], limits: list[int], usage: KVUsage) -> None:
        self._prompt_lens = [len(prompt) for prompt in prompts]
        self._limits = limits
        self._usage = usage
        self._num_steps = 0
        self.first_token_time_s = 0.0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        if not self._num_steps:
            self.first_token_time_s = time.perf_counter()
        rows, columns = input_ids.shape
        growing = [
            n + self._num_steps
            for n, m in zip(self._prompt_lens, self._limits, strict=True)
            if self._num_steps < m
        ]
        self._usage.record(rows * (columns - 1), sum(growing))  # the newest token is not in the cache yet
        self._num_steps += 1
        return torch.zeros(rows, dtype=torch.bool, device=input_ids.device)


def _end_tokens(model: Any) -> list[int]:
    eos = model.generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _until_end(token_ids: list[int], ends: list[int]) -> list[int]:
    """Up to and including the first end token."""
    stop = next((i + 1 for i, token in enumerate(token_ids) if token in ends), len(token_ids))
    return token_ids[:stop]
