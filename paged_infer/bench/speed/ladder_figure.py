"""The ladder picture: how fast each rung is, and what its KV memory holds."""

from __future__ import annotations

from matplotlib.axes import Axes

from paged_infer.bench.speed.ladder import LadderReport, RungReport
from paged_infer.viz.style import BASELINE_COLOURS, FAINT, INK, Picture, new_picture

MIB = 2**20


def ladder_figure(report: LadderReport) -> Picture:
    """Tokens per second (left), and peak KV bytes with the share of them that holds tokens (right)."""
    figure = new_picture(7.6, 0.42 * len(report.rungs) + 1.1)
    speed, memory = figure.subplots(1, 2, sharey=True, width_ratios=(1.0, 1.0))
    _speed_panel(speed, report.rungs)
    _memory_panel(memory, report.rungs)
    for axes in (speed, memory):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.22)
    speed.invert_yaxis()
    same = "same tokens on every rung" if all(r.same_tokens for r in report.rungs) else "TOKENS DIFFER"
    figure.suptitle(f"{report.model}: {report.workload} ({same})", fontsize=9.5, color=INK)
    return figure


def _speed_panel(axes: Axes, rungs: list[RungReport]) -> None:
    names = [rung.name for rung in rungs]
    bars = axes.barh(names, [r.tokens_per_s for r in rungs], color=[_colour(name) for name in names])
    axes.bar_label(bars, [f"{r.tokens_per_s:,.0f}" for r in rungs], padding=3, fontsize=8.5, color=INK)
    axes.set_title("output tokens per second", fontsize=9, color=INK, loc="left")


def _memory_panel(axes: Axes, rungs: list[RungReport]) -> None:
    names = [rung.name for rung in rungs]
    peaks = [(rung.peak_kv_bytes or 0) / MIB for rung in rungs]
    held = [peak * (rung.kv_fill or 0.0) for peak, rung in zip(peaks, rungs, strict=True)]
    outline = axes.barh(names, peaks, color="white", edgecolor=[_colour(name) for name in names], hatch="////")
    axes.barh(names, held, color=[_colour(name) for name in names])
    labels = [_memory_label(rung, peak) for rung, peak in zip(rungs, peaks, strict=True)]
    axes.bar_label(outline, labels, padding=3, fontsize=8.5, color=INK)
    axes.set_title("peak KV memory, MiB (solid: holds tokens)", fontsize=9, color=INK, loc="left")


def _memory_label(rung: RungReport, peak_mib: float) -> str:
    if rung.peak_kv_bytes is None:
        return "it does not say"
    return "none kept" if rung.kv_fill is None else f"{peak_mib:,.1f}, {rung.kv_fill:.0%} full"


def _colour(name: str) -> str:
    return BASELINE_COLOURS.get(name, INK)
