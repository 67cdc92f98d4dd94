"""What ``paged-infer bench parallel`` reports: its numbers, as text and as a figure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes

from paged_infer.bench.metrics import Percentiles
from paged_infer.bench.report import JsonReport
from paged_infer.viz.style import BASELINE_COLOURS, INK, Picture, new_picture, tidy_axes

BLUE, ORANGE = BASELINE_COLOURS["paged"], BASELINE_COLOURS["cached"]
MICROS = [10 ** (k / 20) for k in range(61)]  # 1 to 1,000
WAITS = {"median": "p50", "slowest tenth": "p90"}


@dataclass(slots=True)
class RankReport:
    """An engine of ``size`` ranks.

    Attributes:
        tokens_per_s: by number of requests, submitted at once.
        step_s: seconds of a decode of one request.
        collectives, num_bytes: those in which one rank takes part in a decode of one request, and the bytes it sends.
        weight_bytes: bytes of a rank's parameters.
        peak_bytes: peak resident memory of each process that has a model; empty if there is no /proc.
    """

    size: int
    tokens_per_s: dict[str, float]
    step_s: float
    collectives: int
    num_bytes: int
    weight_bytes: int
    peak_bytes: list[int]


@dataclass(slots=True)
class RoutingReport:
    """Replicas under one routing: all requests at once, then as Poisson arrivals."""

    tokens_per_s: float
    ttft_s: Percentiles
    hit_share: float  # share of the arrivals' prompt tokens that were found in caches


@dataclass(slots=True)
class ParallelReport(JsonReport):
    """``sum_s``: seconds of an all-reduce of a decode's size between two processes. ``num_layers``: the model's."""

    model: str
    machine: dict[str, Any]
    repeats: int
    num_layers: int = 0
    has_same_tokens: bool = True
    sum_s: float = 0.0
    ranks: list[RankReport] = field(default_factory=list)
    workload: str = ""
    num_replicas: int = 0
    per_s: float = 0.0
    routings: dict[str, RoutingReport] = field(default_factory=dict)

    @property
    def even_s(self) -> float:
        """Break-even: the time of an all-reduce with which two ranks decode as fast as one, each with its own cores."""
        return self.ranks[0].step_s / 2 / (2 * self.num_layers + 2)

    def gain(self, sum_s: float) -> float:
        """How many times as fast as one rank two would decode, at best, if an all-reduce took ``sum_s``."""
        one_s = self.ranks[0].step_s
        return one_s / (one_s / 2 + (2 * self.num_layers + 2) * sum_s)


def print_report(report: ParallelReport) -> None:
    for one in report.ranks:
        rates = ", ".join(f"{rate:,.0f} with {n}" for n, rate in one.tokens_per_s.items())
        print(f"ranks: {one.size}; tokens/s {rates} at once; a decode of one request {1e3 * one.step_s:.2f} ms,")
        print(f"  {one.collectives} collectives, {one.num_bytes:,} bytes; weights {one.weight_bytes / 1e6:,.1f} MB,")
        print(f"  at the peak {', '.join(f'{peak / 1e6:,.0f}' for peak in one.peak_bytes)} MB in each process")
    if report.ranks:
        print(
            f"tokens: {'the same' if report.has_same_tokens else 'NOT the same'}; a sum {1e6 * report.sum_s:,.0f} us,"
        )
        print(f"  two ranks break even at {1e6 * report.even_s:,.0f} us; {report.gain(10e-6):.2f} times as fast at 10")
    if report.routings:
        print(f"{report.num_replicas} replicas, {report.workload}; then {report.per_s:.1f} arrivals a second")
    for name, of in report.routings.items():
        first = f"{1e3 * of.ttft_s.p50:,.0f} ms, the slowest tenth {1e3 * of.ttft_s.p90:,.0f}"
        print(f"{name:12}: {of.tokens_per_s:,.0f} tokens/s; first token {first}; hits {of.hit_share:.0%}")


def parallel_figure(report: ParallelReport) -> Picture:
    """Throughput of one rank and of two, the speedup on a faster link, and TTFT under three routings."""
    figure = new_picture(9.6, 3.2)
    rates, link, firsts = figure.subplots(1, 3, width_ratios=(1.0, 1.1, 1.1))
    _bars(rates, {f"{one.size} rank{'s' * (one.size > 1)}": one.tokens_per_s for one in report.ranks})
    if report.ranks:
        link.plot(MICROS, [report.gain(1e-6 * us) for us in MICROS], color=BLUE)
        link.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        link.axvline(1e6 * report.sum_s, color=ORANGE, linewidth=1.5)
        link.text(0.9e6 * report.sum_s, 1.6, "a sum\nhere", ha="right", fontsize=8, color=INK)
    link.set(xscale="log", ylim=(0, 2.1))
    link.xaxis.set_major_formatter("{x:,.0f}")
    link.set_xlabel("microseconds of a sum", fontsize=8, color=INK)
    of_routings = report.routings.items()
    waits = {label: {name: 1e3 * getattr(of.ttft_s, p) for name, of in of_routings} for label, p in WAITS.items()}
    _bars(firsts, waits if report.routings else {})
    tidy_axes(rates, title="tokens/s, by requests at once", labelsize=8)
    tidy_axes(link, title="two ranks, times as fast at best", labelsize=8)
    tidy_axes(firsts, title=f"{report.num_replicas} replicas: first token, ms", labelsize=8)
    figure.suptitle(f"{report.model}: one model in two processes, and two replicas", fontsize=9, color=INK)
    return figure


def _bars(axes: Axes, groups: dict[str, dict[str, float]]) -> None:
    """Draw one bar per group for each name."""
    for number, ((label, heights), colour) in enumerate(zip(groups.items(), (BLUE, ORANGE), strict=False)):
        places = [place + 0.4 * (number - 0.5) for place in range(len(heights))]
        axes.bar_label(
            axes.bar(places, list(heights.values()), 0.38, color=colour, label=label), fmt="%.0f", fontsize=7
        )
        axes.set_xticks(range(len(heights)), [name.replace("_", "\n") for name in heights])
    if groups:
        axes.set_ylim(top=1.35 * max(max(heights.values()) for heights in groups.values()))  # room for the legend
        axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=len(groups), columnspacing=1.0)
