"""How much faster each optimisation is: a series of engines, each with one optimisation more.

    GPU    every kernel launched by the host, one step at a time -> decode steps as CUDA graphs -> the next step begun
           while the one before runs
    CPU    attention in readable torch -> batched torch -> one pass in C, where there is a compiler -> running ahead,
           which cannot pay where host and device are the same processor, and is shown for that

All of them are options of ``LLM``, so each can be switched off alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from paged_infer.bench.options import Common
from paged_infer.bench.speed.engine_runs import watched_engine
from paged_infer.bench.speed.measure import Bench, SpeedReport
from paged_infer.bench.workloads import Workload
from paged_infer.kernels.attention_backends import fastest_backend
from paged_infer.llm import LLM

COMMAND = "optimisations"


def engine_options(device: torch.device) -> dict[str, dict[str, Any]]:
    """The options of the engines by name, from no optimisation to all of them."""
    if device.type == "cuda":
        nothing = {"attention_backend": "triton", "enforce_eager": True, "async_scheduling": False}
        graphs = nothing | {"enforce_eager": False}
        return {"eager": nothing, "+ graphs": graphs, "+ ahead": graphs | {"async_scheduling": True}}
    backends = ["torch", "sdpa"] + ["c"] * (fastest_backend(device) == "c")
    found = {name: {"attention_backend": name, "async_scheduling": False} for name in backends}
    return found | {"+ ahead": found[backends[-1]] | {"async_scheduling": True}}


@contextmanager
def open_engines(common: Common, device: torch.device, longest: int) -> Iterator[dict[str, LLM]]:
    """The engines, on the same weights; on a GPU they share its memory evenly."""
    chosen = engine_options(device)
    share = round(common.engine.gpu_memory_utilization / len(chosen), 3)
    with ExitStack() as stack:
        engines = {}
        for name, options in chosen.items():
            engines[name] = stack.enter_context(common.open(longest, gpu_memory_utilization=share, **options))
        yield engines


def measure_engines(bench: Bench, engines: dict[str, LLM], workload: Workload) -> SpeedReport:
    """The workload on each of them, interleaved; greedy, they are held to the first engine's tokens."""
    report = bench.throughput({name: watched_engine(llm) for name, llm in engines.items()}, workload)
    return replace(report, command=COMMAND)
