"""Everything that a CUDA machine should check, in one command under nine minutes: ``make gpu``.

    tests, compiled  ->  bench kernels, ladder, throughput, optimisations  ->  compile-only table  ->  notebooks

It runs from the source tree (``PYTHONPATH=. python .ci/gpu.py``), and needs no network and nothing but torch, triton,
transformers, matplotlib, pytest, typer and tqdm. Every step is a process of its own with a limit of its own, and one
that fails does not stop the others. Results and logs go to figures/gpu-<device>/, and all of it to one tar file.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from paged_infer.bench.tables import plain_table

ROOT = Path(__file__).resolve().parents[1]
TOTAL_LIMIT_S = 525
MODULE = (sys.executable, "-m")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Step:
    """A command, and how long it may take."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepResult:
    name: str
    outcome: str  # "ok", or what went wrong
    seconds: float
    log: str  # its path below the results' folder; empty if it did not run

    @property
    def passed(self) -> bool:
        return self.outcome == "ok"


def gpu_steps(out: Path) -> list[Step]:
    """What to run; numbers and pictures go to ``out``."""
    tests = (
        *MODULE, "pytest", "--noconftest", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider",
        "-m", "gpu", "-q", "-rfE", "--durations=5", "-W", "ignore::pytest.PytestUnknownMarkWarning",
        str(ROOT / "tests/kernels/test_gpu_kernels.py"), str(ROOT / "tests/bench/test_roofline.py"),
        str(ROOT / "tests/engine/test_gpu_engine.py"),
    )  # fmt: skip
    kernels = (*MODULE, "paged_infer.bench.kernels.cli", "--figures", str(out))
    speed = (*MODULE, "paged_infer.bench.speed.cli")
    shape = ("--model", "qwen3-0.6b", "--load-format", "dummy")
    to_out = ("--figures", str(out))
    compile_only = (*kernels, "--compile-only", "--quick")
    notebook = (sys.executable, str(ROOT / ".ci/notebook_script.py"), "--figures", str(out))
    return [
        Step("kernel-tests", tests, 180),
        Step("bench-kernels", (*kernels, "--time-limit", "160"), 210),
        Step("bench-ladder", (*speed, "ladder", "--dtype", "float32", "--peer", "static", *to_out), 90),
        Step("bench-throughput", (*speed, "throughput", *shape, "--peer", "none", *to_out), 120),
        Step("bench-optimisations", (*speed, "optimisations", *shape, "--repeats", "2", *to_out), 150),
        Step("compile-only", compile_only, 60),
        *(
            Step(f"notebook-{path.stem}", (*notebook, str(path)), 60)
            for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
        ),
    ]


def run_steps(steps: Sequence[Step], out: Path, total_limit_s: float = TOTAL_LIMIT_S) -> list[StepResult]:
    """Run each step to its end, or to its limit, or to that of all; its output goes to ``out``/logs."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    deadline_s = time.perf_counter() + total_limit_s
    results = []
    for step in steps:
        limit_s = min(step.limit_s, deadline_s - time.perf_counter())
        if limit_s < 1:
            results.append(StepResult(step.name, f"not run: {total_limit_s:g} s had passed", 0.0, ""))
        else:
            print(f"{time.strftime('%H:%M:%S')} {step.name} (at most {limit_s:.0f} s)", flush=True)
            results.append(_run_step(step, limit_s, out))
    return results


def _run_step(step: Step, limit_s: float, out: Path) -> StepResult:
    log = Path("logs") / f"{step.name}.log"
    start_s = time.perf_counter()
    with (out / log).open("w", encoding="utf-8") as file:
        file.write(f"$ {' '.join(step.command)}\n")
        file.flush()
        child = subprocess.Popen(
            step.command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=_environment() | dict(step.environment),
            start_new_session=True,  # so that its own children can be ended with it
        )
        try:
            status = child.wait(limit_s)
            outcome = "ok" if status == 0 else f"failed, exit status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit_s:.0f} s"
        finally:
            _end(child)
    return StepResult(step.name, outcome, round(time.perf_counter() - start_s, 1), str(log))


def _end(child: subprocess.Popen[bytes]) -> None:
    """End what is left of a step: the group of processes that was started for it; SIGTERM first."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, sign)
        except ProcessLookupError:
            break  # none is left
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            continue


def _environment() -> dict[str, str]:
    """The package from the source tree, pictures without a window, and no look at the network."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "MPLBACKEND": "Agg",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def write_summary(results: Sequence[StepResult], out: Path) -> str:
    """summary.json and summary.txt in ``out``; returns the text."""
    rows = [(r.name, r.outcome, f"{r.seconds:.0f}", r.log and str(out / r.log)) for r in results]
    text = plain_table(f"{out.name}:", ("step", "outcome", "seconds", "log"), rows)
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    summary = json.dumps([asdict(result) for result in results], indent=1)
    (out / "summary.json").write_text(summary + "\n", encoding="utf-8")
    return text


def pack(out: Path) -> Path:
    """Everything in ``out`` as <out>.tar.gz beside it."""
    path = out.with_name(f"{out.name}.tar.gz")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(out, out.name)
    return path


def slug(name: str) -> str:
    """
    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@app.command()
def main(out: Annotated[Path, typer.Option(help="Folder in which gpu-<device>/ is made.")] = ROOT / "figures") -> None:
    """Kernel tests, benches and notebooks on this CUDA device. Status 1 if any step failed, 2 without CUDA."""
    import torch

    if not torch.cuda.is_available():
        typer.echo("error: there is no CUDA device here: nothing to run", err=True)
        raise typer.Exit(2)
    name = torch.cuda.get_device_name()
    folder = out.resolve() / f"gpu-{slug(name)}"
    print(f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}: results in {folder}", flush=True)
    results = run_steps(gpu_steps(folder), folder)
    print(write_summary(results, folder))
    print(f"everything in one file: {pack(folder)}")
    if not all(result.passed for result in results):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
