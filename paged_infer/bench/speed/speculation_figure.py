"""Speculation's picture: tokens a second by method and number of requests, and the share of accepted drafts."""

from __future__ import annotations

from paged_infer.bench.speed.measure import SpeedReport
from paged_infer.viz.style import BASELINE_COLOURS, INK, Picture, new_picture, tidy_axes

COLOURS = (BASELINE_COLOURS["paged"], BASELINE_COLOURS["cached"], BASELINE_COLOURS["static"], BASELINE_COLOURS["naive"])


def speculation_figure(report: SpeedReport) -> Picture:
    """A group of bars for each number of requests, a colour for each method."""
    loads = sorted({entry.load or 0.0 for entry in report.entries})
    methods = list(dict.fromkeys(entry.series for entry in report.entries))
    figure = new_picture(7.6, 3.2)
    axes = figure.subplots()
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        entries = [entry for entry in report.entries if entry.series == method]
        places = [loads.index(entry.load or 0.0) + (index - (len(methods) - 1) / 2) * width for entry in entries]
        rates = [entry.metrics.output_tokens_per_s for entry in entries]
        bars = axes.bar(places, rates, width * 0.94, color=COLOURS[index % len(COLOURS)], label=method)
        labels = [_label(rate, entry.metrics.acceptance_rate) for rate, entry in zip(rates, entries, strict=True)]
        axes.bar_label(bars, labels, padding=2, fontsize=8, color=INK)
    axes.set_xticks(range(len(loads)), [f"{load:g} at once" for load in loads])
    axes.set_title("output tokens/s (share of drafts accepted)", fontsize=9, color=INK, loc="left")
    tidy_axes(axes, grid="y", labelsize=8.5)
    axes.margins(y=0.15)
    figure.legend(loc="outside lower center", ncols=len(methods), frameon=False, fontsize=8.5)
    return figure


def _label(rate: float, accepted: float | None) -> str:
    return f"{rate:,.0f}" if accepted is None else f"{rate:,.0f}\n({accepted:.0%})"
