"""``paged-infer bench memory | sharing | control | policies | arrival``: what the control plane does, measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from paged_infer.cli_options import Figures, ModelOption, Seed, Without, console, fail, open_llm, with_option_groups
from paged_infer.config import EngineConfig

if TYPE_CHECKING:
    from paged_infer.bench.scheduling.arrival import ArrivalReport
    from paged_infer.bench.scheduling.memory_waste import MemoryReport
    from paged_infer.bench.scheduling.policies import PoliciesReport
    from paged_infer.bench.scheduling.scheduler_cost import ControlReport

app = typer.Typer()


@app.command()
def memory(
    output_tokens: Annotated[int, typer.Option(help="Drawn by the requests of each data set.", min=1)] = 300_000,
    slots: Annotated[int, typer.Option(help="Tokens that the KV memory holds.", min=1)] = 15_728,
    block_size: Annotated[int, typer.Option(help="Tokens in a block.", min=1)] = 16,
    seed: Seed = 0,
    figures: Figures = Path("figures"),
) -> None:
    """What KV memory holds: contiguous reservations beside paging (the PagedAttention paper's Figure 2). No model."""
    from paged_infer.bench.scheduling.memory_figure import fragmentation_figure
    from paged_infer.bench.scheduling.memory_waste import measure_memory

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


@app.command()
@with_option_groups
def sharing(
    engine: Annotated[
        EngineConfig,
        Without(
            enable_prefix_caching="off: only what one request's samples or beams share counts",
            seed="the command's own --seed is the workload's",
        ),
    ],
    model: ModelOption = None,
    width: Annotated[
        list[int] | None, typer.Option(help="Samples or beams of a request; may be repeated.", min=2)
    ] = None,
    num_requests: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 8,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each sample or beam.", min=1)] = 64,
    seed: Seed = 0,
    figures: Annotated[Path, typer.Option(help="Folder for bench-sharing.json.")] = Path("figures"),
) -> None:
    """KV blocks that parallel samples and beams of one request save by sharing them, with a model."""
    try:
        llm = open_llm(model, **replace(engine, enable_prefix_caching=False).options)
        from paged_infer.bench.machine import describe_machine
        from paged_infer.bench.scheduling.sharing import PAPER, SharingReport, measure_sharing
        from paged_infer.bench.workloads import story_beginnings

        prompts = story_beginnings(llm, num_requests, max_tokens, seed).prompts
        with console.status("sampling and searching"):
            savings = measure_sharing(llm, prompts, width or [2, 4, 6], max_tokens)
    except ValueError as error:
        fail(error)
    mean, block_size = sum(map(len, prompts)) / len(prompts), engine.block_size
    report = SharingReport(llm.name, block_size, num_requests, mean, max_tokens, describe_machine(), savings)
    title = (
        f"{llm.name}: {num_requests} prompts of {mean:.0f} tokens on average, {max_tokens} tokens out, "
        f"blocks of {block_size}"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("a request has")
    table.add_column("blocks saved", justify="right")
    table.add_column("the paper's, Alpaca", justify="right")
    for saving in savings:
        low, high = PAPER[saving.kind]
        table.add_row(f"{saving.width} {saving.kind}", f"{saving.saved:.1%}", f"{low} to {high} %")
    console.print(table)
    report.save(figures / "bench-sharing.json")
    console.print(f"numbers: {figures / 'bench-sharing.json'}", highlight=False)


def _show_memory(report: MemoryReport) -> None:
    from paged_infer.bench.scheduling.memory_waste import PAPER_RUNNING, PAPER_SAVED, PAPER_SHARES

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


@app.command()
def control(
    num_seqs: Annotated[int, typer.Option(help="Sequences that run in every step.", min=1)] = 256,
    num_steps: Annotated[int, typer.Option(help="Steps timed in each pool.", min=2)] = 400,
    pool: Annotated[list[int] | None, typer.Option(help="Blocks of a pool; may be repeated.", min=1)] = None,
    step_ms: Annotated[
        float | None,
        typer.Option(help="A model's step, for the trace's share; default: the storyteller's here.", min=0.001),
    ] = None,
    seed: Seed = 0,
    figures: Annotated[Path, typer.Option(help="Folder for bench-control.json.")] = Path("figures"),
) -> None:
    """What deciding a step costs, in pools of a thousand to a million blocks that are 95 % full and evicting."""
    from paged_infer.bench.machine import describe_machine, machine_line
    from paged_infer.bench.scheduling import scheduler_cost as control_load

    machine = describe_machine()
    try:
        with console.status("scheduling"):
            pools = control_load.measure_pools(pool or control_load.POOLS, num_seqs, num_steps, seed)
            lookups = control_load.measure_lookups()
            step_is = (
                "as given" if step_ms else f"the storyteller's, {num_seqs} sequences decoding, on {machine['device']}"
            )
            step_ms = step_ms or control_load.storyteller_step_ms(num_seqs)
    except ValueError as error:
        fail(error)
    report = control_load.ControlReport(num_seqs, num_steps, seed, step_ms, step_is, machine, pools, lookups)
    _show_control(report)
    console.print(f"on {machine_line(machine)}", highlight=False)
    report.save(figures / "bench-control.json")
    console.print(f"numbers: {figures / 'bench-control.json'}", highlight=False)


def _show_control(report: ControlReport) -> None:
    title = f"schedule + update, {report.num_seqs} sequences running, ms a step ({report.num_steps} steps)"
    columns = ("held", "evicted\na step", "hit tokens\na step", "median", "p95", "traced", "p95", "trace\nadds")
    pools = _table(title, "blocks", columns)
    for pool in report.pools:
        times = (pool.plain_ms, pool.plain_p95_ms, pool.traced_ms, pool.traced_p95_ms, pool.trace_ms)
        counts = (f"{pool.held:.0%}", f"{pool.evictions_per_step:.1f}", f"{pool.hit_tokens_per_step:.0f}")
        pools.add_row(f"{pool.num_blocks:,}", *counts, *(f"{ms:.3f}" for ms in times))
    console.print(pools)
    console.print(
        f"largest pool / smallest = {report.flatness:.2f};  trace = {report.trace_share:.2%} of a step of "
        f"{report.step_ms:.1f} ms ({report.step_is})\n",
        highlight=False,
    )
    lookups = _table("prefix lookup", "prompt tokens", ("microseconds", "ns a token", "one block\nlater, us"))
    for one in report.lookups:
        per_token = 1e3 * one.first_us / one.num_tokens
        lookups.add_row(f"{one.num_tokens:,}", f"{one.first_us:.0f}", f"{per_token:.0f}", f"{one.next_block_us:.1f}")
    console.print(lookups)


@app.command()
def policies(
    simulate: Annotated[bool, typer.Option(help="No model: steps take what a formula says.")] = False,
    num_requests: Annotated[int, typer.Option(help="Requests in all.", min=2)] = 200,
    rate: Annotated[
        float | None, typer.Option(help="Arrivals a second; default: what suits whoever serves.", min=0.001)
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Most sequences at once.", min=1)] = 128,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Tokens a step for chunked; default: a quarter of the others'.", min=1)
    ] = None,
    delay: Annotated[
        list[float] | None, typer.Option(help="Delay factor of prefill_first; may be repeated.", min=0)
    ] = None,
    seed: Seed = 0,
    figures: Figures = Path("figures"),
) -> None:
    """The same requests through every policy: throughput, first tokens, and who stands still."""
    from paged_infer.bench.scheduling.measure import run_policies
    from paged_infer.bench.scheduling.policies_figure import policies_figure

    try:
        with console.status("serving"):
            report = run_policies(simulate, num_requests, rate, max_num_seqs, chunk_tokens, delay or [0.0, 0.5], seed)
    except ValueError as error:
        fail(error)
    _show_policies(report)
    picture = figures / ("bench-policies-simulated.png" if simulate else "bench-policies.png")
    report.save(picture.with_suffix(".json"))
    policies_figure(report).save(picture)
    _say_where(picture)


@app.command()
def arrival(
    simulate: Annotated[bool, typer.Option(help="No model: steps take what a formula says.")] = False,
    num_running: Annotated[int, typer.Option(help="Requests that decode meanwhile.", min=1)] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt that arrives.", min=2)] = 4096,
    chunk_tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens a step for chunked; may be repeated.", min=2)
    ] = None,
    figures: Figures = Path("figures"),
) -> None:
    """A long prompt arrives while others decode: whole (prefill_first) and in chunks."""
    from paged_infer.bench.scheduling.arrival_figure import arrival_figure
    from paged_infer.bench.scheduling.measure import run_arrival

    try:
        with console.status("serving"):
            report = run_arrival(simulate, num_running, prompt_tokens, chunk_tokens or [128, 512])
    except ValueError as error:
        fail(error)
    _show_arrival(report)
    picture = figures / ("bench-arrival-simulated.png" if simulate else "bench-arrival.png")
    report.save(picture.with_suffix(".json"))
    arrival_figure(report).save(picture)
    _say_where(picture)


def _show_policies(report: PoliciesReport) -> None:
    columns = ("tokens\n/s", "TTFT\np50, s", "TTFT\np95, s", "gap, ms\np50", "gap\np99", "longest\nstall", "2nd\ntoken")
    table = _table(f"{report.served_by}: {report.load}, at most {report.max_num_seqs} at once", "policy", columns)
    for policy in report.policies:
        gaps = (policy.gap_p50_s, policy.gap_p99_s, policy.longest_stall_s, policy.longest_start_s)
        table.add_row(
            policy.name,
            f"{policy.tokens_per_s:,.0f}",
            f"{policy.ttft_p50_s:.2f}",
            f"{policy.ttft_p95_s:.2f}",
            *(f"{1e3 * gap:,.0f}" for gap in gaps),
        )
    console.print(table)
    _say_machine(report.machine)


def _show_arrival(report: ArrivalReport) -> None:
    title = f"{report.served_by}: {report.num_prompt_tokens:,} tokens arrive while {report.num_running} requests decode"
    table = _table(title, "policy", ("gap before\nms", "longest after\nms", "first token of\nthe prompt, s"))
    for run in report.runs:
        gaps = (f"{1e3 * run.usual_gap_s:.1f}", f"{1e3 * run.longest_gap_s:,.1f}")
        table.add_row(run.name, *gaps, f"{run.ttft_s:.2f}")
    console.print(table)
    _say_machine(report.machine)


def _say_machine(machine: dict[str, Any]) -> None:
    from paged_infer.bench.machine import machine_line

    if machine:
        console.print(f"on {machine_line(machine)}", highlight=False)


def _table(title: str, first: str, others: Iterable[object]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(str(name), justify="right", no_wrap=True)
    return table


def _say_where(picture: Path) -> None:
    console.print(f"picture: {picture}   numbers: {picture.with_suffix('.json')}", highlight=False)
