"""Speed pictures: systems compared to the floor, and throughput and waiting under a growing load."""

from __future__ import annotations

from matplotlib.axes import Axes

from paged_infer.bench.metrics import Percentiles
from paged_infer.bench.speed.ladder_figure import ladder_figure
from paged_infer.bench.speed.measure import Entry, SpeedReport
from paged_infer.bench.speed.serving_figure import serving_figure
from paged_infer.bench.speed.speculation_figure import speculation_figure
from paged_infer.viz.style import BASELINE_COLOURS, INK, Picture, log_heights, new_picture, tidy_axes

CLOSED, OPEN = BASELINE_COLOURS["paged"], BASELINE_COLOURS["cached"]


def speed_figure(report: SpeedReport) -> Picture:
    """Bars for each system; of ``load``, ``serve`` and ``speculation``, all of it over the load."""
    if report.command == "ladder":
        return ladder_figure(report)
    draw = {"load": _load_figure, "serve": serving_figure, "speculation": speculation_figure}.get(
        report.command, _systems_figure
    )
    figure = draw(report)
    figure.suptitle(f"{report.model}, {report.dtype}: {report.workload}", fontsize=9.5, color=INK)
    return figure


def _systems_figure(report: SpeedReport) -> Picture:
    figure = new_picture(7.6, 0.46 * len(report.entries) + 1.3)
    speed, waiting = figure.subplots(1, 2, sharey=True)
    names = [entry.name for entry in report.entries]
    usual = BASELINE_COLOURS["paged"] if report.command == "optimisations" else INK  # all of them are the engine
    colours = [BASELINE_COLOURS.get(name, usual) for name in names]
    rates = [entry.metrics.output_tokens_per_s for entry in report.entries]
    bars = speed.barh(names, rates, color=colours)
    labels = [_rate_label(entry) for entry in report.entries]
    speed.bar_label(bars, labels, padding=3, fontsize=8.5, color=INK)
    speed.set_title("output tokens/s (share of floor's)", fontsize=9, color=INK, loc="left")
    if report.command == "latency":
        _first_runs(waiting, report.entries, colours)
    else:
        _first_tokens(waiting, report.entries, colours)
    for axes in (speed, waiting):
        tidy_axes(axes, "top right left", "x", axis="y", length=0, labelsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.margins(x=0.6)
    speed.invert_yaxis()
    return figure


def _rate_label(entry: Entry) -> str:
    rate, share = f"{entry.metrics.output_tokens_per_s:,.0f}", entry.metrics.floor_share
    return rate if share is None else f"{rate} ({share:.0%})"


def _first_runs(axes: Axes, entries: list[Entry], colours: list[str]) -> None:
    """The settled latency solid, what the first run took above it in outline."""
    names = [entry.name for entry in entries]
    first = [1e3 * entry.first.seconds if entry.first else 0.0 for entry in entries]
    settled = [1e3 * entry.metrics.seconds for entry in entries]
    axes.barh(names, first, color="white", edgecolor=colours, hatch="////")
    axes.barh(names, settled, color=colours)
    for name, later, one in zip(names, settled, first, strict=True):
        _annotate(axes, max(later, one), name, f"{later:,.0f}, first run {one:,.0f}")
    axes.set_title("latency, ms (hatched: first run)", fontsize=9, color=INK, loc="left")


def _first_tokens(axes: Axes, entries: list[Entry], colours: list[str]) -> None:
    """Median wait for the first token, and a line from there to the 99th percentile."""
    for entry, colour in zip(entries, colours, strict=True):
        ttft = entry.metrics.ttft_s
        (bar,) = axes.barh([entry.name], [1e3 * ttft.p50 if ttft else 0.0], color=colour)
        words = "not reported" if ttft is None else f"{1e3 * ttft.p50:,.0f}, p99 {1e3 * ttft.p99:,.0f}"
        if ttft is not None:
            middle = bar.get_y() + bar.get_height() / 2
            axes.plot([1e3 * ttft.p50, 1e3 * ttft.p99], [middle, middle], color=INK, linewidth=1.2)
        _annotate(axes, 1e3 * ttft.p99 if ttft else 0.0, entry.name, words)
    axes.set_title("first token, ms (line: to p99)", fontsize=9, color=INK, loc="left")


def _annotate(axes: Axes, end: float, name: str, words: str) -> None:
    axes.annotate(words, (end, name), (4, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK)


def _load_figure(report: SpeedReport) -> Picture:
    figure = new_picture(7.6, 3.4)
    rate, first, gaps = figure.subplots(1, 3)
    closed = [entry for entry in report.entries if "client" in entry.name]
    opened = [entry for entry in report.entries if "client" not in entry.name]
    for entries, colour, label in ((closed, CLOSED, "closed loop"), (opened, OPEN, "Poisson arrivals")):
        rates = [entry.metrics.output_tokens_per_s for entry in entries]
        places = range(len(closed)) if entries is closed else range(len(closed), len(report.entries))
        rate.bar(places, rates, color=colour, label=label)
        for axes, name in ((first, "ttft_s"), (gaps, "itl_s")):
            _lines(axes, list(places), [getattr(entry.metrics, name) for entry in entries], colour)
    labels = [f"{entry.load:.3g}" for entry in report.entries]
    for axes, title in (
        (rate, "output tokens per second"),
        (first, "first token, ms"),
        (gaps, "from token to token, ms"),
    ):
        axes.set_title(title, fontsize=9, color=INK, loc="left")
        axes.set_xticks(range(len(labels)), labels, fontsize=7.5)
        axes.set_xlabel("clients, then arrivals a second", fontsize=8, color=INK)
        tidy_axes(axes, grid="y", labelsize=7.5)
    for axes in (first, gaps):
        log_heights(axes)
    figure.legend(*rate.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _lines(axes: Axes, places: list[int], times: list[Percentiles | None], colour: str) -> None:
    """p50 as a line, p90 and p99 fainter above it."""
    for name, alpha in (("p50", 1.0), ("p90", 0.6), ("p99", 0.35)):
        known = [(x, 1e3 * getattr(t, name)) for x, t in zip(places, times, strict=True) if t is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "o-", color=colour, alpha=alpha, markersize=4, linewidth=1.4)
            axes.annotate(name, known[-1], (4, 0), textcoords="offset points", fontsize=7.5, va="center", color=INK)
