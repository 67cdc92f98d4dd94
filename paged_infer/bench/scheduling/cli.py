"""``paged-infer bench memory | sharing | control | policies | arrival``: measurements of the control plane."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from paged_infer.bench.report import save_report
from paged_infer.bench.speed.cli import errors
from paged_infer.bench.tables import print_table
from paged_infer.cli_help import PLAIN, Command
from paged_infer.cli_options import RESULTS, BeginningsSeed, Figures, Model, Without, open_llm, with_option_groups
from paged_infer.config import EngineConfig
from paged_infer.terminal import console

if TYPE_CHECKING:
    from paged_infer.bench.scheduling.arrival import ArrivalReport
    from paged_infer.bench.scheduling.memory_waste import MemoryReport
    from paged_infer.bench.scheduling.policies import PoliciesReport
    from paged_infer.bench.scheduling.scheduler_cost import ControlReport

Simulate = Annotated[bool, typer.Option(help="No model: the clock moves by a formula.")]

app = typer.Typer(**PLAIN)


@app.command(cls=Command)
def memory(
    output_tokens: Annotated[int, typer.Option(help="Output tokens of each data set in all.", min=1)] = 300_000,
    slots: Annotated[int, typer.Option(help="Tokens that the KV memory holds.", min=1)] = 15_728,
    block_size: Annotated[int, typer.Option(help="Tokens in a block.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the lengths that requests draw.")] = 0,
    figures: Figures = RESULTS,
) -> None:
    """What KV memory holds: contiguous reservations and paging (the PagedAttention paper's Figure 2). No model."""
    from paged_infer.bench.scheduling.memory_figure import fragmentation_figure
    from paged_infer.bench.scheduling.memory_waste import measure_memory

    with errors(), console.status("filling memory"):
        report = measure_memory(output_tokens, slots, block_size, seed)
    _show_memory(report)
    save_report(report, figures / "bench-memory.json", fragmentation_figure)


def _show_memory(report: MemoryReport) -> None:
    from paged_infer.bench.scheduling.memory_waste import PAPER_RUNNING, PAPER_SAVED, PAPER_SHARES

    header = ("memory", "tokens", "reserved", "internal", "external", "of what is\nin use", "running\nat once")
    for dataset in report.datasets:
        rows, marks = [], []
        for one in dataset.strategies:
            parts = (one.tokens, one.reserved, one.internal, one.external, one.fill)
            rows.append((one.name, *map(_percent, parts), f"{one.mean_running:.1f}"))
            marks.append("")
            if dataset.name == "ShareGPT-like":
                paper = [_percent(part) for part in PAPER_SHARES[one.name].values()]
                if one.name == "paged":
                    paper[1:] = ["", "", ""]
                rows.append(("  the paper's", *paper, "", f"{PAPER_RUNNING[one.name]:.1f}"))
                marks.append("dim")
        title = (
            f"{dataset.name}: {dataset.num_requests:,} requests, mean prompt {dataset.mean_prompt:.0f}, mean output "
            f"{dataset.mean_output:.0f}, {report.num_slots:,} slots"
        )
        print_table(title, header, rows, marks)
        print(f"paged: {dataset['paged'].preemptions:,} preemptions")
    fills = [
        (one.name.split("-")[0], *(f"{fill:.0%}" for fill in one.fill_by_block_size.values()))
        for one in report.datasets
    ]
    sizes = map(str, report.datasets[0].fill_by_block_size)
    print_table("paged, blocks in use that hold tokens", ("block size", *sizes), fills)
    saved = []
    for s in report.sharing:
        paper_saved = PAPER_SAVED.get(s.dataset, {}).get(s.width)
        cells = (f"{s.dataset}, {s.kind}", str(s.width), _percent(s.saved))
        saved.append((*cells, "" if paper_saved is None else _percent(paper_saved)))
    print_table("blocks saved by sharing", ("requests", "width", "saved", "the paper's"), saved)


@app.command(cls=Command)
@with_option_groups
def sharing(
    engine: Annotated[
        EngineConfig,
        Without(
            enable_prefix_caching="off: only what one request's samples or beams share counts",
            seed="the command's own --seed is the workload's",
        ),
    ],
    model: Model = None,
    width: Annotated[
        list[int] | None, typer.Option(help="Samples or beams of a request; may be repeated. Default: 2, 4, 6.", min=2)
    ] = None,
    num_requests: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 8,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each sample or beam.", min=1)] = 64,
    seed: BeginningsSeed = 0,
    figures: Figures = RESULTS,
) -> None:
    """KV blocks that parallel samples and beams of one request save by sharing them, with a model."""
    with errors(), console.status("sampling and searching"):
        llm = open_llm(model, **replace(engine, enable_prefix_caching=False).options)
        from paged_infer.bench.scheduling.sharing import PAPER, SharingReport, measure_sharing
        from paged_infer.bench.workloads import story_beginnings
        from paged_infer.execution.machine import describe_machine

        prompts = story_beginnings(llm, num_requests, max_tokens, seed).prompts
        savings = measure_sharing(llm, prompts, width or [2, 4, 6], max_tokens)
    mean, block_size = sum(map(len, prompts)) / len(prompts), engine.block_size
    title = (
        f"{llm.name}: {num_requests} prompts of {mean:.0f} tokens on average, {max_tokens} tokens out, "
        f"blocks of {block_size}"
    )
    rows = [(f"{s.width} {s.kind}", _percent(s.saved), "{} to {} %".format(*PAPER[s.kind])) for s in savings]
    print_table(title, ("a request has", "blocks saved", "the paper's, Alpaca"), rows)
    report = SharingReport(llm.name, block_size, num_requests, mean, max_tokens, describe_machine(), savings)
    save_report(report, figures / "bench-sharing.json")


@app.command(cls=Command)
def control(
    num_seqs: Annotated[int, typer.Option(help="Sequences that run in every step.", min=1)] = 256,
    num_steps: Annotated[int, typer.Option(help="Steps timed in each pool.", min=2)] = 400,
    pool: Annotated[
        list[int] | None, typer.Option(help="Blocks of a pool; may be repeated. Default: 1000 to 1000000.", min=1)
    ] = None,
    step_ms: Annotated[
        float | None,
        typer.Option(help="A model's step, for the trace's share. Default: the storyteller's here.", min=0.001),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the tokens in the pool and of the prompts.")] = 0,
    figures: Figures = RESULTS,
) -> None:
    """What deciding a step costs, in pools of a thousand to a million blocks that are 95 % full and evicting."""
    from paged_infer.bench.scheduling import scheduler_cost as cost
    from paged_infer.execution.machine import describe_machine

    machine = describe_machine()
    with errors(), console.status("scheduling"):
        pools = cost.measure_pools(pool or cost.POOLS, num_seqs, num_steps, seed)
        lookups = cost.measure_lookups()
        measured = f"the storyteller's, {num_seqs} sequences decoding, on {machine['device']}"
        step_is = "as given" if step_ms else measured
        step_ms = step_ms or cost.storyteller_step_ms(num_seqs)
    report = cost.ControlReport(num_seqs, num_steps, seed, step_ms, step_is, machine, pools, lookups)
    _show_control(report)
    save_report(report, figures / "bench-control.json")


def _show_control(report: ControlReport) -> None:
    title = f"schedule + update, {report.num_seqs} sequences running, ms a step ({report.num_steps} steps)"
    held = ("blocks", "held", "evicted\na step", "hit tokens\na step")
    rows = []
    for one in report.pools:
        counts = (f"{one.num_blocks:,}", f"{one.held:.0%}", f"{one.evictions_per_step:.1f}")
        times = (one.plain_ms, one.plain_p95_ms, one.traced_ms, one.traced_p95_ms, one.trace_ms)
        rows.append((*counts, f"{one.hit_tokens_per_step:.0f}", *(f"{ms:.3f}" for ms in times)))
    print_table(title, (*held, "median", "p95", "traced", "p95", "trace\nadds"), rows)
    print(
        f"largest pool / smallest = {report.flatness:.2f};  trace = {report.trace_share:.2%} of a step of "
        f"{report.step_ms:.1f} ms ({report.step_is})"
    )
    rows = []
    for found in report.lookups:
        tokens, us = found.num_tokens, found.first_us
        rows.append((f"{tokens:,}", f"{us:.0f}", f"{1e3 * us / tokens:.0f}", f"{found.next_block_us:.1f}"))
    print_table("prefix lookup", ("prompt tokens", "microseconds", "ns a token", "one block\nlater, us"), rows)


@app.command(cls=Command)
def policies(
    simulate: Simulate = False,
    num_requests: Annotated[int, typer.Option(help="Requests in all.", min=2)] = 200,
    rate: Annotated[
        float | None, typer.Option(help="Arrivals a second. Default: 12; 10 with --simulate.", min=0.001)
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Most sequences at once.", min=1)] = 128,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Tokens a step for chunked. Default: a quarter of the others'.", min=1)
    ] = None,
    delay: Annotated[
        list[float] | None, typer.Option(help="Delay factor of prefill_first; may be repeated. Default: 0, 0.5.", min=0)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the requests' arrivals and lengths.")] = 0,
    figures: Figures = RESULTS,
) -> None:
    """The same requests through every policy: throughput, first tokens, and the longest stalls."""
    from paged_infer.bench.scheduling.policies import run_policies
    from paged_infer.bench.scheduling.policies_figure import policies_figure

    with errors(), console.status("serving"):
        report = run_policies(simulate, num_requests, rate, max_num_seqs, chunk_tokens, delay or [0.0, 0.5], seed)
    _show_policies(report)
    save_report(report, figures / f"bench-policies{'-simulated' * simulate}.json", policies_figure)


def _show_policies(report: PoliciesReport) -> None:
    rows = []
    for one in report.policies:
        gaps = (one.gap_p50_s, one.gap_p99_s, one.longest_stall_s, one.longest_start_s)
        first = (f"{one.tokens_per_s:,.0f}", f"{one.ttft_p50_s:.2f}", f"{one.ttft_p95_s:.2f}")
        rows.append((one.name, *first, *(f"{1e3 * gap:,.0f}" for gap in gaps)))
    columns = ("tokens\n/s", "TTFT\np50, s", "TTFT\np95, s", "gap, ms\np50", "gap\np99", "longest\nstall", "2nd\ntoken")
    title = f"{report.served_by}: {report.load}, at most {report.max_num_seqs} at once"
    print_table(title, ("policy", *columns), rows)


@app.command(cls=Command)
def arrival(
    simulate: Simulate = False,
    num_running: Annotated[int, typer.Option(help="Requests that decode when it arrives.", min=1)] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt that arrives.", min=2)] = 4096,
    chunk_tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens a step for chunked; may be repeated. Default: 128, 512.", min=2)
    ] = None,
    figures: Figures = RESULTS,
) -> None:
    """A long prompt arrives while others decode: whole (prefill_first) and in chunks."""
    from paged_infer.bench.scheduling.arrival import run_arrival
    from paged_infer.bench.scheduling.policies_figure import arrival_figure

    with errors(), console.status("serving"):
        report = run_arrival(simulate, num_running, prompt_tokens, chunk_tokens or [128, 512])
    _show_arrival(report)
    save_report(report, figures / f"bench-arrival{'-simulated' * simulate}.json", arrival_figure)


def _show_arrival(report: ArrivalReport) -> None:
    title = f"{report.served_by}: {report.num_prompt_tokens:,} tokens arrive while {report.num_running} requests decode"
    rows = [
        (run.name, f"{1e3 * run.usual_gap_s:.1f}", f"{1e3 * run.longest_gap_s:,.1f}", f"{run.ttft_s:.2f}")
        for run in report.runs
    ]
    print_table(title, ("policy", "gap before\nms", "longest after\nms", "first token of\nthe prompt, s"), rows)


def _percent(share: float) -> str:
    return f"{share:.1%}"
