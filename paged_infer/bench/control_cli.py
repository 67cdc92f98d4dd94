"""``paged-infer bench memory | control | policies | arrival``: what the control plane does, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from paged_infer.console import Seed, console, fail

if TYPE_CHECKING:
    from paged_infer.bench.memory_waste import MemoryReport

app = typer.Typer()

Figures = Annotated[Path, typer.Option(help="Folder for the picture and its numbers.")]


@app.command()
def memory(
    output_tokens: Annotated[int, typer.Option(help="Drawn by the requests of each data set.", min=1)] = 300_000,
    slots: Annotated[int, typer.Option(help="Tokens that the KV memory holds.", min=1)] = 15_728,
    block_size: Annotated[int, typer.Option(help="Tokens in a block.", min=1)] = 16,
    seed: Seed = 0,
    figures: Figures = Path("figures"),
) -> None:
    """What KV memory holds: contiguous reservations beside paging (the PagedAttention paper's Figure 2). No model runs."""
    from paged_infer.bench.memory_waste import measure_memory
    from paged_infer.viz.fragmentation import fragmentation_figure

    try:
        with console.status("filling memory"):
            report = measure_memory(output_tokens, slots, block_size, seed)
    except ValueError as error:
        fail(error)
    _show_memory(report)
    picture = figures / "bench-memory.png"
    report.save(picture.with_suffix(".json"))
    fragmentation_figure(report).save(picture)
    _say_where(picture)


def _show_memory(report: MemoryReport) -> None:
    from paged_infer.bench.memory_waste import PAPER_RUNNING, PAPER_SAVED, PAPER_SHARES

    for dataset in report.datasets:
        title = (
            f"{dataset.name}: {dataset.num_requests:,} requests, mean prompt {dataset.mean_prompt:.0f}, mean output "
            f"{dataset.mean_output:.0f}, {report.num_slots:,} slots"
        )
        columns = ("tokens", "reserved", "internal", "external", "of what is\nin use", "running\nat once")
        table = _table(title, "memory", columns)
        for strategy in dataset.strategies:
            parts = [strategy.tokens, strategy.reserved, strategy.internal, strategy.external, strategy.fill]
            table.add_row(strategy.name, *(f"{part:.1%}" for part in parts), f"{strategy.mean_running:.1f}")
            if dataset.name == "ShareGPT-like":
                paper = [f"{part:.1%}" for part in PAPER_SHARES[strategy.name].values()]
                if strategy.name == "paged":
                    paper[1:] = ["", "", ""]
                table.add_row("  the paper's", *paper, "", f"{PAPER_RUNNING[strategy.name]:.1f}", style="dim")
        console.print(table)
        paged = dataset["paged"]
        console.print(f"paged: {paged.preemptions:,} preemptions\n", highlight=False)
    sizes = _table("paged, blocks in use that hold tokens", "block size", report.datasets[0].fill_by_block_size)
    for dataset in report.datasets:
        sizes.add_row(dataset.name.split("-")[0], *(f"{fill:.0%}" for fill in dataset.fill_by_block_size.values()))
    console.print(sizes)
    sharing = _table("blocks saved by sharing", "requests", ("width", "saved", "the paper's"))
    for one in report.sharing:
        paper_saved = PAPER_SAVED.get(one.dataset, {}).get(one.width)
        said = "" if paper_saved is None else f"{paper_saved:.1%}"
        sharing.add_row(f"{one.dataset}, {one.kind}", str(one.width), f"{one.saved:.1%}", said)
    console.print(sharing)


def _table(title: str, first: str, others: object) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:  # type: ignore[attr-defined]
        table.add_column(str(name), justify="right", no_wrap=True)
    return table


def _say_where(picture: Path) -> None:
    console.print(f"picture: {picture}   numbers: {picture.with_suffix('.json')}", highlight=False)
