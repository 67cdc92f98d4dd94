"""Where a step's time goes on a CPU, piece by piece, with one attention backend beside another.

Every piece is a call that returns when it is done, so wrapping them measures them; what is left of a step belongs to
Python and to what has no name here. Each wrapper costs about half a microsecond, alike for all backends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from paged_infer.bench.machine import describe_machine
from paged_infer.bench.workloads import Workload
from paged_infer.kernels.op_sets import Ops
from paged_infer.llm import LLM
from paged_infer.model.linear import Linear

PARTS = (
    "matrix products",
    "attention",
    "norms",
    "norm and rotation of q, k",
    "SiLU",
    "storing k, v",
    "sampling",
    "packing",
    "scheduling",
    "rest",
)
_OPS = {
    "add_rms_norm": "norms",
    "qk_norm_rope": "norm and rotation of q, k",
    "silu_mul": "SiLU",
    "store_kv": "storing k, v",
}


@dataclass(frozen=True, slots=True)
class BackendParts:
    """One backend's runs: medians over the repeats, milliseconds a step, in the order of ``PARTS``."""

    backend: str
    num_steps: int
    step_ms: float
    part_ms: list[float]


@dataclass(frozen=True, slots=True)
class StepReport:
    model: str
    workload: str
    repeats: int
    machine: dict[str, Any]
    backends: list[BackendParts]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def measure_step(llms: Sequence[LLM], workload: Workload, repeats: int) -> StepReport:
    """Serve the workload with each engine in turn, ``repeats`` times, after a run that is not counted."""
    machine = describe_machine()
    runs: dict[str, list[tuple[int, float, list[float]]]] = {}
    for repeat in range(repeats + 1):
        for llm in llms:
            run = _run(llm, workload, salt=f"run {repeat}")
            if repeat:
                runs.setdefault(llm.engine.config.attention_backend, []).append(run)
    backends = [
        BackendParts(
            backend,
            of_one[0][0],
            round(median(step_ms for _, step_ms, _ in of_one), 4),
            [round(median(column), 4) for column in zip(*(parts for _, _, parts in of_one), strict=True)],
        )
        for backend, of_one in runs.items()
    ]
    return StepReport(llms[0].name, workload.name, repeats, machine, backends)


def _run(llm: LLM, workload: Workload, salt: str) -> tuple[int, float, list[float]]:
    """Steps, and milliseconds a step: in all, and part by part."""
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
    """Within the block, the seconds of each part but the rest are summed up in the dict."""
    seconds = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = perf_counter()
            result = fn(*args, **kwargs)
            seconds[part] += perf_counter() - began
            return result

        return call

    engine = llm.engine
    runner, cache, scheduler = engine.runner, engine.runner.cache, engine.scheduler

    def timed_ops(ops: Ops) -> Ops:
        watched: dict[str, Any] = {name: timed(part, getattr(ops, name)) for name, part in _OPS.items()}
        return ops._replace(**watched)

    with ExitStack() as places:

        def put(owner: object, name: str, value: object) -> None:
            before = owner.__dict__.get(name, _ABSENT)
            owner.__dict__[name] = value
            if before is _ABSENT:
                places.callback(owner.__dict__.pop, name)
            else:
                places.callback(owner.__dict__.__setitem__, name, before)

        for module in engine.decoder.modules():
            if isinstance(module, Linear):
                put(module, "forward", timed("matrix products", module.forward))
            ops = getattr(module, "ops", None)
            if isinstance(ops, Ops):
                put(module, "ops", timed_ops(ops))
        put(cache, "ops", timed_ops(cache.ops))
        put(cache, "backend", timed("attention", cache.backend))
        put(runner.sampler, "sample", timed("sampling", runner.sampler.sample))
        put(runner, "_pack", timed("packing", runner._pack))
        for name in ("schedule", "advance", "settle"):
            put(scheduler, name, timed("scheduling", getattr(scheduler, name)))
        yield seconds


_ABSENT = object()
