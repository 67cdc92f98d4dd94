"""Speed pictures: systems compared, drafts compared, and throughput and waiting under a growing load."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes

from paged_infer.bench.metrics import Metrics, Percentiles
from paged_infer.bench.speed.measure import Entry, SpeedReport
from paged_infer.bench.speed.serving_figure import serving_figure
from paged_infer.viz.style import BASELINE_COLOURS, INK, Picture, log_heights, new_picture, tidy_axes

CLOSED, OPEN = BASELINE_COLOURS["paged"], BASELINE_COLOURS["cached"]
METHOD_COLOURS = [BASELINE_COLOURS[name] for name in ("paged", "cached", "static", "naive")]
MIB = 2**20
NEAR = 0.12  # log of the ratio of two heights whose labels would overlap


def speed_figure(report: SpeedReport) -> Picture:
    """Bars for each system; of ``load``, ``serve`` and ``speculation``, all of it over the load."""
    if report.command == "ladder":
        return ladder_figure(report)
    kinds = {"load": _load_figure, "serve": serving_figure, "speculation": _speculation_figure}
    figure = kinds.get(report.command, _systems_figure)(report)
    figure.suptitle(f"{report.model}, {report.dtype}: {report.workload}", fontsize=9.5, color=INK)
    return figure


def ladder_figure(report: SpeedReport) -> Picture:
    """Tokens per second (left), and peak KV bytes with the share of them that holds tokens (right)."""
    figure = new_picture(7.6, 0.42 * len(report.entries) + 1.1)
    speed, memory = figure.subplots(1, 2, sharey=True)
    colours = [BASELINE_COLOURS.get(entry.name, INK) for entry in report.entries]
    _bars(speed, report.entries, _rates(report.entries), color=colours)
    peaks = [(entry.metrics.peak_kv_bytes or 0) / MIB for entry in report.entries]
    labels = [_memory_label(entry.metrics) for entry in report.entries]
    _bars(memory, report.entries, peaks, labels, color="white", edgecolor=colours, hatch="////")
    held = [peak * (entry.metrics.kv_fill or 0.0) for peak, entry in zip(peaks, report.entries, strict=True)]
    memory.barh([entry.name for entry in report.entries], held, color=colours)
    titles = ("output tokens per second", "peak KV memory, MiB (solid: holds tokens)")
    for axes, title in zip((speed, memory), titles, strict=True):
        tidy_axes(axes, "top right left", "x", title=title, axis="y", length=0)
        axes.margins(x=0.22 if axes is speed else 0.45)  # room for the labels
    speed.invert_yaxis()
    figure.suptitle(f"{report.model}: {report.workload} ({_agreement(report)})", fontsize=9.5, color=INK)
    return figure


def _agreement(report: SpeedReport) -> str:
    if all(entry.same_tokens for entry in report.entries):
        return "same tokens on every rung"
    return "same tokens but for near ties" if all(entry.is_right for entry in report.entries) else "TOKENS DIFFER"


def _rates(entries: list[Entry]) -> list[float]:
    return [entry.metrics.output_tokens_per_s for entry in entries]


def _bars(axes: Axes, entries: list[Entry], widths: list[float], labels: list[str] | None = None, **style: Any) -> None:
    """A labelled bar for each entry; without ``labels`` it shows its width."""
    bars = axes.barh([entry.name for entry in entries], widths, **style)
    axes.bar_label(bars, labels or [f"{width:,.0f}" for width in widths], padding=3, fontsize=8.5, color=INK)


def _memory_label(metrics: Metrics) -> str:
    if metrics.peak_kv_bytes is None:
        return "not reported"
    return "none kept" if metrics.kv_fill is None else f"{metrics.peak_kv_bytes / MIB:,.1f}, {metrics.kv_fill:.0%} full"


def _systems_figure(report: SpeedReport) -> Picture:
    figure = new_picture(7.6, 0.46 * len(report.entries) + 1.3)
    speed, waiting = figure.subplots(1, 2, sharey=True)
    usual = BASELINE_COLOURS["paged"] if report.command == "optimisations" else INK  # all of them are the engine
    colours = [BASELINE_COLOURS.get(entry.name, usual) for entry in report.entries]
    labels = [_rate_label(entry.metrics) for entry in report.entries]
    _bars(speed, report.entries, _rates(report.entries), labels, color=colours)
    if report.command == "latency":
        title = "latency, ms (hatched: first run)"
        _first_runs(waiting, report.entries, colours)
    else:
        title = "first token, ms (line: to p99)"
        _first_tokens(waiting, report.entries, colours)
    for axes, name in ((speed, "output tokens/s (share of floor's)"), (waiting, title)):
        tidy_axes(axes, "top right left", "x", title=name, axis="y", length=0, labelsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.margins(x=0.6)
    speed.invert_yaxis()
    return figure


def _rate_label(metrics: Metrics) -> str:
    share = "" if metrics.floor_share is None else f" ({metrics.floor_share:.0%})"
    return f"{metrics.output_tokens_per_s:,.0f}{share}"


def _first_runs(axes: Axes, entries: list[Entry], colours: list[str]) -> None:
    """The settled latency solid, and below it, hatched, what the first run took."""
    places = range(len(entries))
    first = [1e3 * entry.first.seconds if entry.first else 0.0 for entry in entries]
    settled = [1e3 * entry.metrics.seconds for entry in entries]
    axes.barh([place - 0.16 for place in places], settled, 0.46, color=colours)
    axes.barh([place + 0.24 for place in places], first, 0.3, color="white", edgecolor=colours, hatch="////")
    for place, later, one in zip(places, settled, first, strict=True):
        _annotate(axes, later, place - 0.16, f"{later:,.0f}")
        _annotate(axes, one, place + 0.24, f"{one:,.0f}")


def _first_tokens(axes: Axes, entries: list[Entry], colours: list[str]) -> None:
    """Median wait for the first token, and a line from there to the 99th percentile."""
    for entry, colour in zip(entries, colours, strict=True):
        ttft = entry.metrics.ttft_s
        middle, worst = (1e3 * ttft.p50, 1e3 * ttft.p99) if ttft else (0.0, 0.0)
        axes.barh([entry.name], [middle], color=colour)
        if ttft:
            axes.plot([middle, worst], [entry.name, entry.name], color=INK, linewidth=1.2)
        _annotate(axes, worst, entry.name, f"{middle:,.0f}, p99 {worst:,.0f}" if ttft else "not reported")


def _annotate(axes: Axes, end: float, place: str | float, words: str) -> None:
    axes.annotate(words, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK)


def _load_figure(report: SpeedReport) -> Picture:
    figure = new_picture(7.6, 3.4)
    rate, first, gaps = figure.subplots(1, 3)
    closed = [entry for entry in report.entries if "client" in entry.name]
    opened = [entry for entry in report.entries if "client" not in entry.name]
    place = 0
    for entries, colour, label in ((closed, CLOSED, "closed loop"), (opened, OPEN, "Poisson arrivals")):
        places = list(range(place, place + len(entries)))
        place += len(entries)
        rate.bar(places, _rates(entries), color=colour, label=label)
        _lines(first, places, [entry.metrics.ttft_s for entry in entries], colour)
        _lines(gaps, places, [entry.metrics.itl_s for entry in entries], colour)
    labels = [f"{entry.load:.2g}" for entry in report.entries]
    titles = ("output tokens per second", "first token, ms", "from token to token, ms")
    for axes, title in zip((rate, first, gaps), titles, strict=True):
        axes.set_xticks(range(len(labels)), labels, fontsize=7.5)
        axes.set_xlabel("clients, then arrivals a second", fontsize=8, color=INK)
        tidy_axes(axes, grid="y", title=title, labelsize=7.5)
    for axes in (first, gaps):
        log_heights(axes)
    figure.legend(*rate.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _lines(axes: Axes, places: list[int], times: list[Percentiles | None], colour: str) -> None:
    """p50 as a line, p90 and p99 fainter above it; lines that end at one place share a label."""
    ends: dict[tuple[float, float], list[str]] = {}
    for name, alpha in (("p50", 1.0), ("p90", 0.6), ("p99", 0.35)):
        known = [(x, 1e3 * getattr(t, name)) for x, t in zip(places, times, strict=True) if t is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "o-", color=colour, alpha=alpha, markersize=4, linewidth=1.4)
            x, y = known[-1]
            near = next((end for end in ends if abs(math.log(end[1] / y)) < NEAR), (x, y))
            ends.setdefault(near, []).append(name)
    for end, names in ends.items():
        words = ", ".join(names)
        axes.annotate(words, end, (4, 0), textcoords="offset points", fontsize=7.5, va="center", color=INK)


def _speculation_figure(report: SpeedReport) -> Picture:
    """A group of bars for each number of requests, a colour for each method."""
    loads = sorted({entry.load or 0.0 for entry in report.entries})
    methods = list(dict.fromkeys(entry.series for entry in report.entries))
    figure = new_picture(7.6, 3.2)
    axes = figure.subplots()
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        entries = [entry for entry in report.entries if entry.series == method]
        places = [loads.index(entry.load or 0.0) + (index - (len(methods) - 1) / 2) * width for entry in entries]
        colour = METHOD_COLOURS[index % len(METHOD_COLOURS)]
        bars = axes.bar(places, _rates(entries), width * 0.94, color=colour, label=method)
        axes.bar_label(bars, [_drafts_label(entry.metrics) for entry in entries], padding=2, fontsize=8, color=INK)
    axes.set_xticks(range(len(loads)), [f"{load:g} at once" for load in loads])
    tidy_axes(axes, grid="y", title="output tokens/s (share of drafts accepted)", labelsize=8.5)
    axes.margins(y=0.15)
    figure.legend(loc="outside lower center", ncols=len(methods), frameon=False, fontsize=8.5)
    return figure


def _drafts_label(metrics: Metrics) -> str:
    accepted = "" if metrics.acceptance_rate is None else f"\n({metrics.acceptance_rate:.0%})"
    return f"{metrics.output_tokens_per_s:,.0f}{accepted}"
