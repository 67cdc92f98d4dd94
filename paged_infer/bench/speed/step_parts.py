"""Where a step's time goes on a CPU, piece by piece, with one attention backend compared to another.

Every piece is a call that returns when its work is done, so clocking the calls measures them; the rest of a step is
Python and what has no name here. Clocking costs all backends alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as ReadOnlyList
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

from paged_infer.bench.report import JsonReport
from paged_infer.bench.speed.step_spans import clocked, replaced, watch_steps
from paged_infer.bench.workloads import Workload
from paged_infer.execution.machine import describe_machine
from paged_infer.kernels.op_sets import Ops
from paged_infer.llm import LLM
from paged_infer.model.linear import Linear

_OPS = {
    "add_rms_norm": "norms",
    "qk_norm_rope": "norm and rotation of q, k",
    "silu_mul": "SiLU",
    "store_kv": "storing k, v",
}
PARTS = ("matrix products", "attention", *_OPS.values(), "sampling", "packing", "scheduling", "rest")


@dataclass(frozen=True, slots=True)
class BackendParts:
    """One backend's runs: medians over the repeats, milliseconds a step, in the order of ``PARTS``."""

    backend: str
    num_steps: int
    step_ms: float
    part_ms: list[float]

    num_runs: int | None = None  # None: as many as the report's ``repeats``


@dataclass(frozen=True, slots=True)
class StepReport(JsonReport):
    """``repeats``: as asked for."""

    model: str
    workload: str
    repeats: int
    machine: dict[str, Any]
    backends: list[BackendParts]
    is_complete: bool = True  # False: saved after a run, and the command has not reached its end


def measure_step(
    llms: ReadOnlyList[LLM],
    workload: Workload,
    repeats: int,
    save: Callable[[StepReport], None] | None = None,
    deadline_s: float = math.inf,
) -> StepReport:
    """Serve the workload with each engine in turn, ``repeats`` times, after a run that is not counted.

    ``save`` gets the report of all runs so far after each of them; ``deadline_s``: see ``interleave``.
    """
    machine = describe_machine()
    runs: dict[str, list[StepRun]] = {llm.engine.config.attention_backend: [] for llm in llms}

    def report(is_complete: bool) -> StepReport:
        backends = [_parts(backend, its_runs) for backend, its_runs in runs.items() if its_runs]
        return StepReport(llms[0].name, workload.name, repeats, machine, backends, is_complete)

    round_s = 0.0
    for repeat in range(repeats + 1):
        began_s = perf_counter()
        if repeat > 1 and began_s + round_s > deadline_s:
            break
        for llm in llms:
            run = _run(llm, workload, salt=f"run {repeat}")
            if repeat:
                runs[llm.engine.config.attention_backend].append(run)
                if save is not None:
                    save(report(is_complete=False))
        round_s = perf_counter() - began_s
    return report(is_complete=True)


StepRun = tuple[int, float, list[float]]
"""The number of steps, and milliseconds a step: in all, and of each part."""


def _parts(backend: str, runs: list[StepRun]) -> BackendParts:
    return BackendParts(
        backend,
        runs[0][0],
        round(median(step_ms for _, step_ms, _ in runs), 4),
        [round(median(column), 4) for column in zip(*(parts for _, _, parts in runs), strict=True)],
        len(runs),
    )


def _run(llm: LLM, workload: Workload, salt: str) -> StepRun:
    before = llm.stats()["steps"]
    began = perf_counter()
    with watch_parts(llm) as seconds:
        llm.generate(workload.prompts, workload.params, use_tqdm=False, cache_salt=salt)
    total_s = perf_counter() - began
    num_steps = int(llm.stats()["steps"] - before)
    seconds["rest"] = total_s - sum(seconds.values())
    return num_steps, 1e3 * total_s / num_steps, [1e3 * seconds[part] / num_steps for part in PARTS]


@contextmanager
def watch_parts(llm: LLM) -> Iterator[dict[str, float]]:
    """Within the block, add up the seconds of each part but the rest; those of ``watch_steps`` at its end."""
    seconds = dict.fromkeys(PARTS, 0.0)
    cache = llm.engine.in_process.runner.cache

    def clocked_ops(ops: Ops) -> Ops:
        calls: dict[str, Any] = {name: clocked(seconds, part, getattr(ops, name)) for name, part in _OPS.items()}
        return ops._replace(**calls)

    attributes: list[tuple[object, str, object]] = [
        (cache, "ops", clocked_ops(cache.ops)),
        (cache, "backend", clocked(seconds, "attention", cache.backend)),
    ]
    for module in llm.engine.decoder.modules():
        if isinstance(module, Linear):
            attributes.append((module, "forward", clocked(seconds, "matrix products", module.forward)))
        if isinstance(ops := getattr(module, "ops", None), Ops):
            attributes.append((module, "ops", clocked_ops(ops)))
    with watch_steps(llm.engine) as span_s, replaced(attributes):
        yield seconds
    seconds.update(sampling=span_s["sample"], packing=span_s["pack"], scheduling=span_s["schedule"] + span_s["update"])
