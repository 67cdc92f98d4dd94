"""The ladder picture: how fast each baseline is, and what its KV memory holds."""

from __future__ import annotations

from matplotlib.axes import Axes

from paged_infer.bench.metrics import Metrics
from paged_infer.bench.speed.measure import Entry, SpeedReport
from paged_infer.viz.style import BASELINE_COLOURS, INK, Picture, new_picture, tidy_axes

MIB = 2**20


def ladder_figure(report: SpeedReport) -> Picture:
    """Tokens per second (left), and peak KV bytes with the share of them that holds tokens (right)."""
    figure = new_picture(7.6, 0.42 * len(report.entries) + 1.1)
    speed, memory = figure.subplots(1, 2, sharey=True, width_ratios=(1.0, 1.0))
    _speed_panel(speed, report.entries)
    _memory_panel(memory, report.entries)
    for axes in (speed, memory):
        tidy_axes(axes, "top right left", "x", axis="y", length=0)
        axes.margins(x=0.22)
    speed.invert_yaxis()
    same = "same tokens on every rung" if all(entry.same_tokens for entry in report.entries) else "TOKENS DIFFER"
    figure.suptitle(f"{report.model}: {report.workload} ({same})", fontsize=9.5, color=INK)
    return figure


def _speed_panel(axes: Axes, entries: list[Entry]) -> None:
    names, rates = [entry.name for entry in entries], [entry.metrics.output_tokens_per_s for entry in entries]
    bars = axes.barh(names, rates, color=[_colour(name) for name in names])
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=8.5, color=INK)
    axes.set_title("output tokens per second", fontsize=9, color=INK, loc="left")


def _memory_panel(axes: Axes, entries: list[Entry]) -> None:
    names = [entry.name for entry in entries]
    peaks = [(entry.metrics.peak_kv_bytes or 0) / MIB for entry in entries]
    held = [peak * (entry.metrics.kv_fill or 0.0) for peak, entry in zip(peaks, entries, strict=True)]
    outline = axes.barh(names, peaks, color="white", edgecolor=[_colour(name) for name in names], hatch="////")
    axes.barh(names, held, color=[_colour(name) for name in names])
    axes.bar_label(outline, [_memory_label(entry.metrics) for entry in entries], padding=3, fontsize=8.5, color=INK)
    axes.set_title("peak KV memory, MiB (solid: holds tokens)", fontsize=9, color=INK, loc="left")


def _memory_label(metrics: Metrics) -> str:
    if metrics.peak_kv_bytes is None:
        return "not reported"
    return "none kept" if metrics.kv_fill is None else f"{metrics.peak_kv_bytes / MIB:,.1f}, {metrics.kv_fill:.0%} full"


def _colour(name: str) -> str:
    return BASELINE_COLOURS.get(name, INK)
