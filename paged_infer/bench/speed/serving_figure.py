"""The server's picture: throughput and waiting over the number of clients, and over the rate of arrivals."""

from __future__ import annotations

from matplotlib.axes import Axes

from paged_infer.bench.speed.measure import Entry, SpeedReport
from paged_infer.viz.style import BASELINE_COLOURS, INK, Picture, log_heights, new_picture, tidy_axes

# The server's two lines in its own colour; that of one request at a time in the cached baseline's.
CLOSED = (BASELINE_COLOURS["paged"], "#6fa8d6", BASELINE_COLOURS["cached"])
OPEN = BASELINE_COLOURS["nano-vllm"]


def serving_figure(report: SpeedReport) -> Picture:
    """Above: output tokens a second and latency over the clients of closed loops. Below: the first token, over
    clients and over the rate of arrivals. Latencies are p50, and fainter p99.
    """
    figure = new_picture(7.6, 5.4)
    (speed, latency), (first, arrivals) = figure.subplots(2, 2)
    closed = _series(report, "client")
    opened = _series(report, "a second")
    for index, (name, entries) in enumerate(closed.items()):
        colour = CLOSED[min(index, 2)]
        loads = [entry.load or 0.0 for entry in entries]
        rates = [entry.metrics.output_tokens_per_s for entry in entries]
        speed.plot(loads, rates, "o-", color=colour, label=name, markersize=4, linewidth=1.6)
        _waits(latency, entries, "latency_s", colour)
        _waits(first, entries, "ttft_s", colour)
    for entries in opened.values():
        _waits(arrivals, entries, "ttft_s", OPEN, "first token")
        _waits(arrivals, entries, "latency_s", INK, "whole answer")
    for entry in report.entries:
        if entry.load is None:
            rate = entry.metrics.output_tokens_per_s
            speed.axhline(rate, color=INK, linewidth=1.0, linestyle="--", label=f"{entry.name}, without HTTP")
    _axes(speed, "output tokens per second", "clients")
    speed.set_ylim(bottom=0)
    _axes(latency, "whole answer, ms (p50, fainter p99)", "clients")
    _axes(first, "first token, streamed, ms (p50, fainter p99)", "clients")
    _axes(arrivals, "Poisson arrivals, streamed: ms (p50, fainter p99)", "arrivals a second")
    clients = sorted({entry.load for entries in closed.values() for entry in entries if entry.load})
    for axes in (speed, latency, first):
        axes.set_xscale("log", base=2)
        axes.set_xticks(clients, [f"{load:g}" for load in clients])
        axes.minorticks_off()
    for axes in (latency, first, arrivals):
        log_heights(axes)
    if opened:
        arrivals.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _series(report: SpeedReport, kind: str) -> dict[str, list[Entry]]:
    series: dict[str, list[Entry]] = {}
    for entry in report.entries:
        if kind in entry.name:
            series.setdefault(entry.series, []).append(entry)
    return series


def _waits(axes: Axes, entries: list[Entry], metric: str, colour: str, label: str | None = None) -> None:
    """Over the load; nothing where no entry knows it."""
    known = [(entry.load or 0.0, times) for entry in entries if (times := getattr(entry.metrics, metric)) is not None]
    if known:
        places = [load for load, _ in known]
        middle, worst = [1e3 * one.p50 for _, one in known], [1e3 * one.p99 for _, one in known]
        axes.plot(places, middle, "o-", color=colour, label=label, markersize=4, linewidth=1.6)
        axes.plot(places, worst, "o-", color=colour, alpha=0.35, markersize=3, linewidth=1.2)


def _axes(axes: Axes, title: str, below: str) -> None:
    axes.set_xlabel(below, fontsize=8, color=INK)
    tidy_axes(axes, grid="y", title=title, labelsize=7.5)
