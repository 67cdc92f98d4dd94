"""The first minutes on a CUDA machine: does it work, and how fast is it? ``make gpu-first OUT=FOLDER LIMIT=170``.

    machine     versions and limits; the rates of a copy, of a read and of a matrix product
    kernels     every kernel in bfloat16 and in float32 against float64, in processes side by side
    engines     Qwen3-0.6B's shape eager, with graphs, and ahead: tokens, tokens/s, memory of the graphs
    throughput  nano-vLLM's workload with 64 requests, then with 256

Each stage (``first_stages``) is a process of its own. A result is one line on the screen and in OUT/first.jsonl; logs
are in OUT/first-results.tar.gz, beside a summary (``step_results``). Without CUDA everything runs on small sizes, and
what needs CUDA is skipped.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import typer
from first_stages import Lines
from gpu import Limit, Out, begin, refuse
from step_runner import ONE_THREAD, ROOT, Step, run_steps

LIMIT_S = 170
SHARES = {"machine": 20, "kernels": 45, "engines": 40, "throughput": 50}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def stages(lines: Path, has_cuda: bool) -> list[Step]:
    """Each adds its results to ``lines``."""
    script = str(ROOT / ".ci/first_stages.py")
    return [
        Step(
            name,
            (sys.executable, script, name, str(lines)),
            share,
            environment={} if has_cuda else ONE_THREAD,
            is_shown=True,
        )
        for name, share in SHARES.items()
    ]


@app.command()
def main(out: Out = None, limit: Limit = LIMIT_S) -> None:
    """Machine, kernels, engines and throughput: a line for each result. Status 1 if a stage failed."""
    start_s = time.monotonic()
    try:
        device, results = begin(out, prefix="first-")
    except ValueError as error:
        refuse(error)
    lines = results.tar.with_name("first.jsonl")  # those of an earlier run come before this line
    Lines("run", lines).write("started", {"device": device.title, "date": time.strftime("%Y-%m-%d %H:%M:%S")})
    chosen = stages(lines, device.has_cuda)
    raise typer.Exit(run_steps(chosen, results, limit - (time.monotonic() - start_s)))


if __name__ == "__main__":
    app()
