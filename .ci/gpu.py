"""What a CUDA machine should measure and check, in one command under nine minutes.

    make gpu OUT=FOLDER STEPS="kernel-tests throughput" LIMIT=480

It runs from the source tree and needs no network and nothing but torch, triton, transformers, matplotlib, pytest, typer
and tqdm. Steps run in the order given, by default the most useful first. Results go to ``OUT``, by default
figures/gpu-<device>, as one tar and a summary (``step_results``). Without CUDA, the steps that a CPU can run are run on
small sizes, and the others are skipped with a reason.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from step_results import Results
from step_runner import ONE_THREAD, RESERVE_S, ROOT, SHORTEST_S, Step, environment, run_steps

LIMIT_S = 480
FIND_DEVICE_S = 60.0  # a broken driver may never answer
GPU_KERNEL_TESTS = [f"kernels/test_gpu_{name}.py" for name in ("kernels", "attention", "few_bits")]
NAMES = ("sweep", "throughput", "trace", "kernels", "kernel-tests", "engine-tests", "ladder")  # the most useful first

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Out = Annotated[Path | None, typer.Option(help="Folder for the results. Default: figures/gpu-<device>.")]
Limit = Annotated[float, typer.Option(help="Seconds for the whole command.", min=RESERVE_S + 2 * SHORTEST_S)]


@dataclass(frozen=True, slots=True)
class Device:
    """What torch finds, in a process of its own: this one must not hold GPU memory."""

    name: str
    has_cuda: bool
    versions: str

    @property
    def title(self) -> str:
        return f"{self.name}, {self.versions}" + ("" if self.has_cuda else ": no CUDA device")

    @property
    def folder(self) -> Path:
        return ROOT / "figures" / f"gpu-{slug(self.name)}"


FIND_DEVICE = """
import json, platform, torch
has_cuda = torch.cuda.is_available()
name = torch.cuda.get_device_name() if has_cuda else "cpu"
versions = f"torch {torch.__version__}, Python {platform.python_version()}"
print(json.dumps({"name": name, "has_cuda": has_cuda, "versions": versions}))
"""


def find_device() -> Device:
    """
    Raises:
        ValueError: this Python cannot import torch, or torch fails to look for a device, or takes too long.
    """
    command = [sys.executable, "-c", FIND_DEVICE]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=FIND_DEVICE_S
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{sys.executable} found no answer in {error.timeout:g} s: is there a GPU?") from error
    if found.returncode != 0:
        raise ValueError(f"{sys.executable} cannot look for a GPU: {(found.stderr.strip() or '?').splitlines()[-1]}")
    return Device(**json.loads(found.stdout.splitlines()[-1]))


def begin(out: Path | None, prefix: str = "") -> tuple[Device, Results]:
    """The device, and where results go. An ``out`` that is given has results before torch looks for a device.

    Raises:
        ValueError: see ``find_device`` and ``Results``.
    """
    results = Results(out.resolve(), "looking for a GPU", prefix) if out else None
    device = find_device()
    results = results or Results(device.folder, device.title, prefix)
    results.title = device.title
    print(f"{device.title}: results in {results.tar.parent}", flush=True)
    return device, results


def gpu_steps(names: Sequence[str], figures: Path, has_cuda: bool, has_xdist: bool) -> list[Step]:
    """The steps of these names, some of which are several processes; last, the predictions beside what was measured.

    Numbers and pictures go to ``figures``.

    Raises:
        ValueError: no step has one of the names.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"STEPS={unknown[0]}: no such step; there are {', '.join(NAMES)}")
    bounded = ("--time-limit", "{seconds}", "--figures", str(figures))
    compiles = "" if has_cuda else "needs CUDA: it compiles kernels"
    times = "" if has_cuda else "needs CUDA: on a CPU kernels are interpreted"
    few = [] if has_cuda else ["--num-requests", "4"]
    on_cpu = [] if has_cuda else [*few, "--repeats", "1"]
    lengths = [] if has_cuda else ["--shortest", "4", "--longest", "16"]
    scale = [] if has_cuda else ["--scale", "0.03"]
    one_prompt_step = [] if has_cuda else ["--prompt-steps", "1"]  # so few tokens take no more
    qwen3 = ["--model", "qwen3-0.6b", "--load-format", "dummy"] if has_cuda else []

    def speed(name: str, *options: str) -> tuple[str, ...]:
        return _module("paged_infer.bench.speed.cli", name, *options, *bounded)

    parallel = ["-n", "8", "--dist", "worksteal"] if has_xdist else []
    steps = {
        "sweep": [Step("sweep", _module("paged_infer.bench.kernels.cli", "--sweep", *bounded), 100, skipped=times)],
        "throughput": [
            Step("throughput", speed("throughput", *qwen3, "--peer", "none", *on_cpu, *scale), 50),
            Step("optimisations", speed("optimisations", *qwen3, *(on_cpu or ["--repeats", "2"]), *scale), 70),
        ],
        "trace": [
            Step(
                "trace",
                _module("paged_infer.bench.speed.cli", "trace", *qwen3, *few, *scale, *one_prompt_step, *bounded[2:]),
                30,
            )
        ],
        "kernels": [Step("kernels", _module("paged_infer.bench.kernels.cli", *bounded), 80)],
        "kernel-tests": [
            Step("kernel-tests", _tests(*GPU_KERNEL_TESTS, options=parallel), 45, skipped=compiles),
            # They break a capture on purpose, after which torch 2.11 frees no cached memory in that process.
            Step("timing-tests", _tests("bench/test_roofline.py", "bench/test_failed_capture.py"), 15),
        ],
        # They measure free memory: nothing else may run at the same time.
        "engine-tests": [Step("engine-tests", _tests("engine/test_gpu_engine.py"), 45, skipped=compiles)],
        "ladder": [Step("ladder", speed("ladder", "--dtype", "float32", "--peer", "static", *on_cpu, *lengths), 30)],
    }
    compares = "" if has_cuda else "needs CUDA: the predictions are for a GPU"
    command = (sys.executable, str(ROOT / ".ci/predictions.py"), str(figures))
    predictions = Step("predictions", command, 8, skipped=compares, is_shown=True)
    chosen = [step for name in dict.fromkeys(names) for step in steps[name]]
    if {"throughput", "kernels"} & set(names):
        chosen.append(predictions)
    return chosen if has_cuda else [replace(step, environment=ONE_THREAD) for step in chosen]


def _module(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *arguments)


def _tests(*paths: str, options: Sequence[str] = ()) -> tuple[str, ...]:
    """pytest without what a bare machine lacks: no conftest (it needs hypothesis), no configuration, no cache."""
    return _module(
        "pytest", "--noconftest", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-q", "-rfE",
        "--tb=short", "-o", "faulthandler_timeout=60", "--durations=5",
        "-W", "ignore::pytest.PytestUnknownMarkWarning", *options, *(str(ROOT / "tests" / path) for path in paths),
    )  # fmt: skip


def slug(name: str) -> str:
    """
    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def refuse(error: ValueError) -> NoReturn:
    """One line on standard error, and exit status 2."""
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(2)


@app.command()
def main(
    out: Out = None,
    steps: Annotated[str, typer.Option(help="Steps, separated by spaces; they run in this order.")] = " ".join(NAMES),
    limit: Limit = LIMIT_S,
) -> None:
    """Sweep, benches, trace and tests on this machine. Status 1 if a step failed, 2 if the command is wrong."""
    start_s = time.monotonic()
    try:
        names = steps.split() or NAMES
        gpu_steps(names, Path(), False, False)  # a wrong name is found before torch is imported, which takes seconds
        device, results = begin(out)
    except ValueError as error:
        refuse(error)
    has_xdist = importlib.util.find_spec("xdist") is not None
    chosen = gpu_steps(names, results.figures, device.has_cuda, has_xdist)
    raise typer.Exit(run_steps(chosen, results, limit - (time.monotonic() - start_s)))


if __name__ == "__main__":
    app()
