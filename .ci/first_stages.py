"""A stage of ``make gpu-first``, as a process of its own: ``python .ci/first_stages.py STAGE LINES``.

A result is one line on the screen, and one JSON line at the end of the file LINES, written before anything else starts.
After an exception, the last 20 lines of its traceback are printed, and the next result follows. On a CPU everything
runs on small sizes: the storyteller, and interpreted kernels.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step_runner import end_with_parent

if TYPE_CHECKING:
    from paged_infer.config import EngineOptions
    from paged_infer.llm import LLM

TRACEBACK_LINES = 20


class Lines:
    """Results of a stage: each goes to ``path`` and to the screen at once."""

    def __init__(self, stage: str, path: Path) -> None:
        self.stage, self.path = stage, path
        self.num_failed = 0

    def write(self, what: str, values: dict[str, Any], not_shown: dict[str, Any] | None = None) -> None:
        line = json.dumps({"stage": self.stage, "what": what, **values, **(not_shown or {})}) + "\n"
        # One write to the end of the file: lines of processes that write at the same time do not mix.
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode())
                os.fsync(file.fileno())
        except OSError as error:  # the screen has it
            print(f"{self.path} cannot be written: {error}", flush=True)
        numbers = ((name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in values.items())
        shown = ", ".join(f"{name} {value}" for name, value in numbers)
        print(f"{time.strftime('%H:%M:%S')} {self.stage}, {what}: {shown}", flush=True)

    def measure(self, what: str, measured: Callable[[], dict[str, Any]]) -> None:
        """Write what ``measured`` returns, or what it raises."""
        start_s = time.perf_counter()
        try:
            values = measured()
        except Exception:
            lines = self.failed(what)
            print("\n".join(lines), flush=True)
        except KeyboardInterrupt:  # its time is over: the file and the log have what it was measuring
            self.failed(what)
            traceback.print_exc()
            sys.exit(1)
        else:
            self.write(what, values | {"seconds": round(time.perf_counter() - start_s, 2)})

    def failed(self, what: str) -> list[str]:
        """Write the exception that is being handled; returns the end of its traceback."""
        self.num_failed += 1
        lines = traceback.format_exc().splitlines()[-TRACEBACK_LINES:]
        self.write(what, {"failed": lines[-1]}, {"traceback": lines})
        return lines


# -- Stages ----------------------------------------------------------------------------------------------------------


def machine(lines: Lines) -> None:
    lines.measure("versions", _versions)
    lines.measure("limits", _limits)
    lines.measure("rates", _rates)


def _versions() -> dict[str, Any]:
    import torch
    import triton

    from paged_infer.execution.machine import describe_machine

    query = ["--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit", "--format=csv,noheader"]
    return {
        "nvidia-smi": _output("nvidia-smi", *query),
        **describe_machine(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gcc": _output("gcc", "--version"),
        "kernel": platform.release(),
    }


def _limits() -> dict[str, Any]:
    import resource

    return {
        "ulimit -l": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "ulimit -n": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "/dev/shm bytes free": shutil.disk_usage("/dev/shm").free,
        "/tmp bytes free": shutil.disk_usage("/tmp").free,
    }


def _output(*command: str) -> str:
    """The first line that a command prints, or why there is none."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"none: {error}"
    return (ran.stdout.strip() or ran.stderr.strip() or f"exit status {ran.returncode}").splitlines()[0]


def _rates() -> dict[str, Any]:
    from paged_infer.bench.roofline import measure

    return measure(_device()).as_json()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def kernels(lines: Lines) -> None:
    """A process for each kernel and dtype, as compiling takes most of the time; on a CPU, one for each core."""
    from paged_infer.bench.kernels.checks import CHECKS

    jobs = [f"{kernel}:{dtype}" for kernel in CHECKS for dtype in ("bfloat16", "float32")]
    num_cores = len(os.sched_getaffinity(0))
    shares = [[job] for job in jobs] if _device() == "cuda" else [jobs[n::num_cores] for n in range(num_cores)]

    def run(share: list[str]) -> int:
        command = [sys.executable, __file__, "check", str(lines.path), *share]
        return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode

    with ThreadPoolExecutor(num_cores) as pool:
        for share, status in zip(shares, pool.map(run, shares), strict=True):
            lines.num_failed += status != 0
            if status < 0:  # it could not write so itself
                lines.write(" ".join(share), {"failed": f"ended by {signal.Signals(-status).name}"})


def check(lines: Lines, *jobs: str) -> None:
    """Check some kernels; a job is a kernel and a dtype: ``name:dtype``."""
    for job in jobs:
        lines.measure(job, partial(_check, lines, *job.split(":")))


def _check(lines: Lines, kernel: str, dtype: str) -> dict[str, Any]:
    import torch

    from paged_infer.bench.kernels.checks import CHECKS, COMPILED, INTERPRETED

    device = torch.device(_device())
    sizes = COMPILED if device.type == "cuda" else INTERPRETED
    its_dtype = getattr(torch, dtype)
    sizes = replace(sizes, tolerances={its_dtype: sizes.tolerances[its_dtype]})
    results = list(CHECKS[kernel](device, sizes))
    largest = max(results, key=lambda one: one.error)
    values: dict[str, Any] = {"error": largest.error, "allowed": largest.tolerance, "cases": len(results)}
    if wrong := [f"{one.case}: {one.error:.3g} > {one.tolerance:.3g}" for one in results if not one.passed]:
        lines.num_failed += 1
        values["wrong"] = wrong
    return values


def engines(lines: Lines) -> None:
    """The same greedy requests on engines, each with one optimisation more than the last."""
    num_requests, max_tokens = (16, 64) if _device() == "cuda" else (2, 8)
    nothing: EngineOptions = {"enforce_eager": True, "async_scheduling": False}
    options: dict[str, EngineOptions] = {"eager": nothing}
    if _device() == "cuda":
        options["graphs"] = nothing | {"enforce_eager": False}
        options["graphs, ahead"] = options["graphs"] | {"async_scheduling": True}
    else:
        lines.write("graphs", {"skipped": "needs CUDA"})
        options["ahead"] = nothing | {"async_scheduling": True}
    tokens: dict[str, list[list[int]]] = {}

    def run(name: str) -> dict[str, Any]:
        from paged_infer.bench.speed.engine_runs import run_engine
        from paged_infer.bench.workloads import random_lengths

        # One engine after the other on the same GPU: the share leaves room for what the last one has not freed.
        with opened(4 * max_tokens, gpu_memory_utilization=0.25, **options[name]) as llm:
            workload = random_lengths(llm, num_requests, max_tokens, 2 * max_tokens, seed=0)
            run_engine(llm.engine, workload.sample(num_requests, 4))  # compiles
            ran = run_engine(llm.engine, workload.sample(num_requests, max_tokens))
            tokens[name] = ran.token_ids
            first = next(iter(tokens.values()))
            same = sum(ours == others for ours, others in zip(ran.token_ids, first, strict=True))
            values = {
                "model": llm.name,
                "dtype": str(llm.engine.decoder.dtype),
                "tokens/s": ran.num_tokens / ran.seconds,
            }
            values |= {"same tokens": f"{same} of {num_requests}", "steps": ran.num_steps}
            graphs, profile = llm.engine.executor.runner.graphs, llm.engine.memory.profile
            if graphs is not None:
                values["bytes of graphs"] = graphs.num_bytes
                values["allowed by the profile"] = profile and profile.graphs
            return values

    for name in options:
        lines.measure(name, partial(run, name))


def throughput(lines: Lines) -> None:
    """Few requests first: their run also compiles what prompts need."""
    from paged_infer.bench.floor import ModelCost
    from paged_infer.bench.options import NanoRequests
    from paged_infer.bench.roofline import measure
    from paged_infer.bench.speed.engine_runs import run_engine
    from paged_infer.bench.speed.measure import lengths

    on_gpu = _device() == "cuda"
    few, many = (64, 256) if on_gpu else (2, 4)
    requests = NanoRequests(scale=1.0 if on_gpu else 0.03)
    with opened(requests.longest, gpu_memory_utilization=0.9) as llm:
        engine = llm.engine
        roofline = measure(engine.device, dtype=engine.decoder.dtype)

        def run(num_requests: int) -> dict[str, Any]:
            workload = replace(requests, num_requests=num_requests).draw(llm, seed=0)
            run_engine(engine, workload.sample(4, 16))
            ran = run_engine(engine, workload)
            num_running = min(num_requests, engine.config.max_num_seqs)
            floor = ModelCost.of(engine.decoder).floor(*lengths(workload), roofline, num_running)
            return {
                "model": llm.name,
                "tokens/s": ran.num_tokens / ran.seconds,
                "share of the floor": floor.seconds / ran.seconds,
                "run_s": ran.seconds,
                "steps": ran.num_steps,
                "span_s": {name: round(seconds, 3) for name, seconds in ran.span_s.items()},
                "max_num_batched_tokens": engine.memory.max_num_batched_tokens,
            }

        for num_requests in (few, many):
            lines.measure(f"{num_requests} requests", partial(run, num_requests))


@contextmanager
def opened(longest: int, **options: Any) -> Iterator[LLM]:
    """An engine of Qwen3-0.6B's shape with random weights; without CUDA, the storyteller."""
    from paged_infer.bench.options import Common
    from paged_infer.config import EngineConfig

    on_gpu = _device() == "cuda"
    model, load_format = ("qwen3-0.6b", "dummy") if on_gpu else (None, "auto")
    with Common(model, EngineConfig(load_format=load_format)).open(longest, **options) as llm:
        yield llm


STAGES: dict[str, Callable[..., None]] = {
    "machine": machine, "kernels": kernels, "engines": engines, "throughput": throughput, "check": check,
}  # fmt: skip


def run_stage(name: str, path: str, *arguments: str) -> int:
    """Returns the exit status: 1 if something failed."""
    end_with_parent()
    faulthandler.register(signal.SIGTERM, chain=True)  # for the log: where a call of a library hangs
    lines = Lines("kernels" if name == "check" else name, Path(path))
    try:
        STAGES[name](lines, *arguments)
    except Exception:
        print("\n".join(lines.failed("all of it")), flush=True)
    return int(lines.num_failed > 0)


if __name__ == "__main__":
    sys.exit(run_stage(*sys.argv[1:]))
