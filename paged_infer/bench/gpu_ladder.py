"""The ladder on this machine's best device, without the command line's progress bar: ``python -m ... OUT``.

In float32, where every rung must give the same tokens (law 1); that is what makes it a check, and not the fastest run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paged_infer.bench.tables import print_table

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Argument(help="Folder for bench-ladder.json and bench-ladder.png.")],
    num_requests: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 32,
    longest: Annotated[int, typer.Option(help="Most tokens of a prompt, and of an output.", min=4)] = 128,
    repeats: Annotated[int, typer.Option(help="Interleaved runs; medians are reported.", min=1)] = 3,
) -> None:
    """Static and paged beside transformers, with the storyteller's weights. Status 1 if tokens differ."""
    from paged_infer import LLM
    from paged_infer.bench.ladder import run_ladder
    from paged_infer.bench.machine import machine_line
    from paged_infer.bench.rungs import our_rungs, transformers_rungs
    from paged_infer.bench.workloads import random_lengths
    from paged_infer.viz.ladder import ladder_figure

    llm = LLM(dtype="float32")
    rungs = {**our_rungs(llm), **transformers_rungs(llm)}
    del rungs["naive"], rungs["cached"]
    workload = random_lengths(llm, num_requests, min(16, longest // 2), longest, seed=0)
    report = run_ladder(
        rungs, workload, llm.name, repeats, on_run=lambda name: print(f"ran {name}", flush=True)
    )
    report.save(out / "bench-ladder.json")
    ladder_figure(report).save(out / "bench-ladder.png")
    header = ("rung", "seconds", "tokens/s", "first token, ms", "peak KV, MiB", "same tokens")
    rows = [
        (
            rung.name,
            f"{rung.seconds:.2f}",
            f"{rung.tokens_per_s:,.0f}",
            f"{rung.ttft_s * 1e3:,.0f}",
            f"{rung.peak_kv_bytes / 2**20:,.1f}",
            "yes" if rung.same_tokens else "NO",
        )
        for rung in report.rungs
    ]
    print_table(f"{report.model}: {report.workload}, float32", header, rows)
    print(f"on {machine_line(report.machine)}")
    if not all(rung.same_tokens for rung in report.rungs):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
