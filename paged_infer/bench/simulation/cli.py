"""``paged-infer bench simulate``: predict how a server would serve a workload."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paged_infer.bench.report import save_report
from paged_infer.bench.simulation.prediction import ServerOptions
from paged_infer.bench.speed.cli import errors
from paged_infer.bench.tables import print_table
from paged_infer.cli_options import RESULTS, Figures, with_option_groups
from paged_infer.terminal import console

if TYPE_CHECKING:
    from paged_infer.bench.simulation.prediction import SimulateReport
    from paged_infer.simulation.cards import Card

PARTS = ("mean", "p50", "p90", "p99")


@with_option_groups
def simulate(server: ServerOptions, figures: Figures = RESULTS) -> None:
    """Predict a server: the real scheduler, with step times computed from a card's data sheet. No model runs.

    With --records, also signed relative errors against what a real server did with the same workload.
    """
    from paged_infer.bench.simulation.figure import simulate_figure
    from paged_infer.bench.simulation.prediction import predict

    with errors(), console.status("simulating") as status:
        report = predict(server, measure_cpu, lambda what: status.update(f"simulating: {what}"))
    show(report)
    save_report(report, figures / "bench-simulate.json", simulate_figure)


def measure_cpu() -> Card:
    """This machine as a card, in float32: rates as ``bench.roofline`` measures them."""
    from paged_infer.bench.roofline import measure
    from paged_infer.simulation.cards import Card

    rates = measure("cpu")
    # Only the pool's gigabyte of the memory is used, however much there is.
    return Card("cpu", 2**30, rates.bandwidth_bytes_per_s, rates.matmul_flops_per_s, rates.matmul_flops_per_s)


def show(report: SimulateReport) -> None:
    found, theirs, wrong = report.prediction, report.measured, report.errors
    names = [("makespan", "", "s", 1.0)]
    names += [("ttft", part, "s", 1.0) for part in PARTS]
    names += [("tpot", part, "ms", 1e3) for part in PARTS if found.tpot]
    names += [("latency", part, "s", 1.0) for part in PARTS]
    rows = []
    for name, part, unit, factor in names:
        ours = getattr(found, name)
        cells = [" ".join(filter(None, (name, part))) + f", {unit}", f"{factor * (ours[part] if part else ours):,.2f}"]
        if theirs is not None and wrong is not None:
            measured, error = (each[name][part] if part else each[name] for each in (theirs, wrong))
            cells += [f"{factor * measured:,.2f}", f"{error:+.1%}"]
        rows.append(cells)
    title = f"{report.model} on {found.gpu}, {report.workload}, {report.cost_model}"
    print_table(title, ("", "predicted", *(("measured", "error") if wrong else ())), rows)
    print(
        f"{found.tokens_per_s:,.0f} output tokens/s, {found.num_steps:,} steps, {found.preemptions:,} preemptions, "
        f"{found.num_blocks:,} blocks, {found.pool_use:.0%} of them in use (at most {found.peak_pool_use:.0%})"
    )
    for note in report.notes:
        print(f"note: {note}")
    header = ("card", "load", "tokens/s", "ttft p50, s", "ttft p99, s", "tpot p50, ms", "preemptions")
    loads = [
        (
            one.gpu, f"{one.load:.3g}", f"{one.tokens_per_s:,.0f}", f"{one.ttft['p50']:.2f}", f"{one.ttft['p99']:.2f}",
            f"{1e3 * one.tpot['p50']:.1f}" if one.tpot else "-", f"{one.preemptions:,}",
        )
        for one in report.loads
    ]  # fmt: skip
    unit = "clients" if report.options["concurrency"] else "requests a second"
    print_table(f"at other loads ({unit})", header, loads)
    changes = [(one.what, f"{one.makespan:+.1%}", f"{one.ttft:+.1%}", f"{one.tpot:+.1%}") for one in report.assumptions]
    print_table("what another assumption would change", ("", "makespan", "ttft mean", "tpot mean"), changes)
