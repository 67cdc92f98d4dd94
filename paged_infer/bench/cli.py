"""``paged-infer bench``, and how a ladder is run and shown (``compare`` uses it too)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from paged_infer.bench import control_cli
from paged_infer.bench.kernels_cli import kernels
from paged_infer.bench.shapes import SHAPES, folder_of
from paged_infer.bench.tables import print_table
from paged_infer.console import Backend, BlockSize, Device, Dtype, LoadFormat, Seed, console, fail, open_llm

if TYPE_CHECKING:
    from paged_infer.bench.ladder import LadderReport
    from paged_infer.bench.rungs import Contender
    from paged_infer.bench.workloads import Workload

BenchModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help=f"Local folder, hub id, or with --load-format dummy a shape: {', '.join(SHAPES)}. "
        "Default: the storyteller.",
    ),
]

app = typer.Typer(help="Measurements beside what a user would pick instead.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measurements beside what a user would pick instead."""


app.command()(kernels)
app.add_typer(control_cli.app)  # without a name: its commands are commands of ours


@app.command()
def ladder(
    model: BenchModel = None,
    load_format: LoadFormat = "auto",
    num_requests: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 32,
    shortest: Annotated[int, typer.Option(help="Fewest tokens of a prompt, and of an output.", min=1)] = 16,
    longest: Annotated[int, typer.Option(help="Most tokens of a prompt, and of an output.", min=1)] = 128,
    repeats: Annotated[int, typer.Option(help="Interleaved runs; medians are reported.", min=1)] = 5,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attention_backend: Backend = "auto",
    block_size: BlockSize = 16,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="What the rungs cached and static reserve; dummy weights: twice --longest."),
    ] = None,
    slow_rungs: Annotated[bool, typer.Option(help="Also naive and cached, one request at a time.")] = False,
    figures: Annotated[Path, typer.Option(help="Folder for bench-ladder.png and .json.")] = Path("figures"),
) -> None:
    """Random prompts and output lengths at once: static and paged beside transformers on the same weights.

    Exits with status 1 if tokens differ in float32, where they must not.
    """
    if load_format == "dummy":
        max_model_len = max_model_len or 2 * longest
    try:
        with folder_of(model, load_format) as folder:
            llm = open_llm(
                folder,
                load_format=load_format,
                dtype=dtype,
                device=device,
                attention_backend=attention_backend,
                block_size=block_size,
                max_model_len=max_model_len,
            )
            from paged_infer.bench.rungs import our_rungs
            from paged_infer.bench.transformers_peers import transformers_peers
            from paged_infer.bench.workloads import random_lengths

            workload = random_lengths(llm, num_requests, shortest, longest, seed)
            rungs = {**our_rungs(llm), **transformers_peers(llm)}
            if not slow_rungs:
                del rungs["naive"], rungs["cached"]
            report = run_with_progress(rungs, workload, llm.name, repeats)
    except ValueError as error:
        fail(error)
    show_ladder(report, figures / "bench-ladder.png")
    for peer in ("transformers static", "transformers generate_batch"):
        console.print(f"{report.ratio('paged', peer)}", highlight=False)
    console.print(f"medians of {repeats} interleaved runs, and the least and most of one run's own ratio")
    if str(llm.engine.decoder.dtype) == "torch.float32" and not all(r.same_tokens for r in report.rungs):
        raise typer.Exit(1)


def run_with_progress(
    rungs: Mapping[str, Contender], workload: Workload, model: str, repeats: int
) -> LadderReport:
    """``run_ladder`` with a bar that names the rung that ran last."""
    from paged_infer.bench.ladder import run_ladder

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{'warming up':<27}", total=repeats * len(rungs))
        return run_ladder(
            rungs,
            workload,
            model,
            repeats,
            on_run=lambda name: progress.update(task, advance=1, description=f"{name:<27}"),
        )


def show_ladder(report: LadderReport, picture: Path) -> None:
    """The report as a table, and as ``picture`` with its numbers in a .json beside it."""
    from paged_infer.bench.machine import machine_line
    from paged_infer.viz.ladder import ladder_figure

    print_ladder(report)
    console.print(f"on {machine_line(report.machine)}", highlight=False)
    report.save(picture.with_suffix(".json"))
    ladder_figure(report).save(picture)
    console.print(f"picture: {picture}   numbers: {picture.with_suffix('.json')}", highlight=False)


def print_ladder(report: LadderReport) -> None:
    header = ("rung", "seconds", "tokens/s", "first token, ms", "peak KV, MiB", "holds tokens", "same tokens")
    rows = [
        (
            rung.name,
            f"{rung.seconds:.2f}",
            f"{rung.tokens_per_s:,.0f}",
            f"{rung.ttft_s * 1e3:,.0f}",
            "-" if rung.peak_kv_bytes is None else f"{rung.peak_kv_bytes / 2**20:,.2f}",
            "-" if rung.kv_fill is None else f"{rung.kv_fill:.1%}",
            "yes" if rung.same_tokens else "NO",
        )
        for rung in report.rungs
    ]
    marks = ["" if rung.same_tokens else "bold red" for rung in report.rungs]
    title = f"{report.model}: {report.workload}, seed {report.seed}, {report.num_tokens:,} tokens out"
    print_table(title, header, rows, marks)
