"""``paged-infer bench``, and how a ladder is run and shown (``compare`` uses it too)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from paged_infer.bench import control_cli
from paged_infer.bench.kernels_cli import kernels
from paged_infer.console import Backend, BlockSize, Device, Dtype, Model, Seed, console, fail, open_llm

if TYPE_CHECKING:
    from paged_infer.bench.ladder import LadderReport
    from paged_infer.bench.rungs import Rung
    from paged_infer.bench.workloads import Workload

app = typer.Typer(help="Measurements beside what a user would pick instead.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measurements beside what a user would pick instead."""


app.command()(kernels)
app.add_typer(control_cli.app)  # without a name: its commands are commands of ours


@app.command()
def ladder(
    model: Model = None,
    num_requests: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 32,
    shortest: Annotated[int, typer.Option(help="Fewest tokens of a prompt, and of an output.", min=1)] = 16,
    longest: Annotated[int, typer.Option(help="Most tokens of a prompt, and of an output.", min=1)] = 128,
    repeats: Annotated[int, typer.Option(help="Interleaved runs; medians are reported.", min=1)] = 5,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attention_backend: Backend = "auto",
    block_size: BlockSize = 16,
    slow_rungs: Annotated[bool, typer.Option(help="Also naive and cached, one request at a time.")] = False,
    figures: Annotated[Path, typer.Option(help="Folder for bench-ladder.png and .json.")] = Path("figures"),
) -> None:
    """Random prompts and output lengths at once: static and paged beside transformers on the same weights."""
    try:
        llm = open_llm(
            model, dtype=dtype, device=device, attention_backend=attention_backend, block_size=block_size
        )
        from paged_infer.bench.rungs import our_rungs, transformers_rungs
        from paged_infer.bench.workloads import random_lengths

        workload = random_lengths(llm, num_requests, shortest, longest, seed)
        rungs = {**our_rungs(llm), **transformers_rungs(llm)}
        if not slow_rungs:
            del rungs["naive"], rungs["cached"]
        report = run_with_progress(rungs, workload, llm.name, repeats)
    except ValueError as error:
        fail(error)
    show_ladder(report, figures / "bench-ladder.png")
    ratio = report["paged"].tokens_per_s / report["transformers static"].tokens_per_s
    console.print(f"paged / transformers static = {ratio:.2f} (medians of {repeats} interleaved runs)")


def run_with_progress(
    rungs: Mapping[str, Rung], workload: Workload, model: str, repeats: int
) -> LadderReport:
    """``run_ladder`` with a bar that names the rung that ran last."""
    from paged_infer.bench.ladder import run_ladder

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{'warming up':<19}", total=repeats * len(rungs))
        return run_ladder(
            rungs,
            workload,
            model,
            repeats,
            on_run=lambda name: progress.update(task, advance=1, description=f"{name:<19}"),
        )


def show_ladder(report: LadderReport, picture: Path) -> None:
    """The report as a table, and as ``picture`` with its numbers in a .json beside it."""
    from paged_infer.bench.machine import machine_line
    from paged_infer.viz.ladder import ladder_figure

    console.print(ladder_table(report))
    console.print(f"on {machine_line(report.machine)}", highlight=False)
    report.save(picture.with_suffix(".json"))
    ladder_figure(report).save(picture)
    console.print(f"picture: {picture}   numbers: {picture.with_suffix('.json')}", highlight=False)


def ladder_table(report: LadderReport) -> Table:
    title = f"{report.model}: {report.workload}\nseed {report.seed}, {report.num_tokens:,} tokens out"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rung", no_wrap=True)
    for name in ("seconds", "tokens/s", "first\ntoken", "peak KV\nMiB", "holds\ntokens", "same\ntokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for rung in report.rungs:
        table.add_row(
            rung.name,
            f"{rung.seconds:.2f}",
            f"{rung.tokens_per_s:,.0f}",
            f"{rung.ttft_s * 1e3:,.0f} ms",
            f"{rung.peak_kv_bytes / 2**20:,.2f}",
            "-" if rung.kv_fill is None else f"{rung.kv_fill:.1%}",
            "[green]yes[/green]" if rung.same_tokens else "[bold red]no[/bold red]",
        )
    return table
