"""The figure of a prediction: compared with measurements, over the load, and under other assumptions."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from paged_infer.bench.simulation.prediction import SimulateReport
from paged_infer.viz.style import BASELINE_COLOURS, INK, Picture, log_heights, new_picture, tidy_axes

OURS, THEIRS = BASELINE_COLOURS["paged"], BASELINE_COLOURS["static"]
CARD_COLOURS = (
    OURS,
    THEIRS,
    BASELINE_COLOURS["cached"],
    BASELINE_COLOURS["nano-vllm"],
    BASELINE_COLOURS["transformers"],
)
PARTS = ("mean", "p50", "p90", "p99")


def simulate_figure(report: SimulateReport) -> Picture:
    """Above: each percentile, predicted and measured. Below: throughput and first token over the load, for each card,
    and what another assumption would change.
    """
    figure = new_picture(9.0, 5.6)
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(1.0, 1.15)))
    for axes, name in zip(above.subplots(1, 3), ("ttft", "tpot", "latency"), strict=True):
        _percentiles(axes, report, name)
    speed, first, changes = below.subplots(1, 3, width_ratios=(1.0, 1.0, 1.25))
    unit = "clients" if report.options["concurrency"] else "requests a second"
    for number, gpu in enumerate(dict.fromkeys(one.gpu for one in report.loads)):
        colour = CARD_COLOURS[number % len(CARD_COLOURS)]
        points = [one for one in report.loads if one.gpu == gpu]
        loads = [one.load for one in points]
        style = {"color": colour, "markersize": 4, "linewidth": 1.6}
        speed.plot(loads, [one.tokens_per_s for one in points], "o-", label=gpu, **style)
        first.plot(loads, [one.ttft["p50"] for one in points], "o-", **style)
        first.plot(loads, [one.ttft["p99"] for one in points], "o--", alpha=0.45, **style)
    speed.set_ylim(0, 1.12 * max(one.tokens_per_s for one in report.loads))
    speed.legend(frameon=False, fontsize=8, labelcolor=INK)
    log_heights(first)
    for axes, title in ((speed, "output tokens a second"), (first, "first token, s (p50, dashed p99)")):
        axes.set_xlabel(unit, fontsize=8, color=INK)
        tidy_axes(axes, title=title, labelsize=7.5)
    _changes(changes, report)
    figure.suptitle(
        f"{report.model} on {report.prediction.gpu}, by {report.cost_model}: {report.workload}", fontsize=9.5, color=INK
    )
    return figure


def _percentiles(axes: Axes, report: SimulateReport, name: str) -> None:
    ours = getattr(report.prediction, name)
    if not ours:
        axes.set_axis_off()
        return
    unit, factor = ("ms", 1e3) if name == "tpot" else ("s", 1.0)
    wide = 0.38 if report.measured else 0.7
    bars = axes.bar(range(4), [factor * ours[part] for part in PARTS], wide, color=OURS, label="predicted")
    if report.measured is not None and report.errors is not None:
        places = [place + wide for place in range(4)]
        measured = [factor * report.measured[name][part] for part in PARTS]
        bars = axes.bar(places, measured, wide, color=THEIRS, label="measured")
        axes.bar_label(bars, [f"{report.errors[name][part]:+.1%}" for part in PARTS], fontsize=7, color=INK, padding=2)
        axes.legend(frameon=False, fontsize=7.5, labelcolor=INK, loc="upper left")
    else:
        axes.bar_label(bars, [f"{factor * ours[part]:,.3g}" for part in PARTS], fontsize=7, color=INK, padding=2)
    axes.set_xticks([place + (wide / 2 if report.measured else 0) for place in range(4)], PARTS)
    axes.margins(y=0.22)
    full = {"ttft": "first token (TTFT)", "tpot": "each further token (TPOT)", "latency": "whole answer"}[name]
    tidy_axes(axes, grid="y", title=f"{full}, {unit}", labelsize=7.5)


def _changes(axes: Axes, report: SimulateReport) -> None:
    """Changes of makespan and mean TTFT, in percent."""
    places = range(len(report.assumptions))
    for shift, name, colour in ((-0.19, "makespan", OURS), (0.19, "ttft", BASELINE_COLOURS["cached"])):
        values = [100 * getattr(one, name) for one in report.assumptions]
        bars = axes.barh([place + shift for place in places], values, 0.36, color=colour, label=name)
        axes.bar_label(bars, [f"{value:+.1f}" for value in values], fontsize=6.5, color=INK, padding=2)
    axes.set_yticks(places, [one.what for one in report.assumptions])
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.margins(x=0.25)
    axes.legend(frameon=False, fontsize=7.5, labelcolor=INK)
    tidy_axes(axes, grid="x", title="another assumption changes, %", labelsize=7)
