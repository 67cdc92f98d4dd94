"""The report of ``bench quantisation``: quality of schemes, speed and memory of engines, as tables and a figure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from paged_infer.bench.quantisation.engines import Memory
from paged_infer.bench.quantisation.quality import Quality
from paged_infer.bench.report import JsonReport
from paged_infer.bench.side_by_side.turns import PeerResult
from paged_infer.bench.tables import print_table
from paged_infer.viz.style import BASELINE_COLOURS, INK, Picture, log_heights, new_picture, tidy_axes

GIB = 2**30
LEFT_BITS, NEAR_BITS, AWAY_BITS, LINE = 6.0, 1.5, 0.55, 0.22  # placement of names; LINE: decades between two of them
LINE_COLOUR = BASELINE_COLOURS["naive"]
_MARKS = {"rtn": "o", "awq": "s", "gptq": "^", "smoothquant": "D", "llama.cpp": "X"}
_COLOURS = [BASELINE_COLOURS[name] for name in ("naive", "cached", "static", "paged", "nano-vllm", "transformers")]


@dataclass(slots=True)
class QuantisationReport(JsonReport):
    """Quality and speed; a half that this run did not measure is empty, or that of an earlier run.

    Attributes:
        machine: the machine of the last run.
        texts: the texts that quality was measured on.
        memory_bytes: what a process may use, to count the blocks that fit.
        memory: memory of each engine.
        workloads: the name of the workload of each number of requests.
        output_tokens: output tokens of the workload of each number of requests.
        speed: runs of each engine, and of llama.cpp with each file.
        left_out: engines that could not run, each with the reason.
        speed_machine: the machine of the run that measured ``speed``.
    """

    model: str
    machine: dict[str, Any]
    texts: str = ""
    quality: list[Quality] = field(default_factory=list)
    memory_bytes: int = 0
    memory: dict[str, Memory] = field(default_factory=dict)
    workloads: dict[str, str] = field(default_factory=dict)
    output_tokens: dict[str, int] = field(default_factory=dict)
    speed: dict[str, PeerResult] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    speed_machine: dict[str, Any] = field(default_factory=dict)

    def with_halves_of(self, path: Path) -> QuantisationReport:
        """This report, with the numbers of an earlier run of the same model until they are measured again."""
        earlier = self.read(path) if path.is_file() else self
        if earlier.model != self.model:
            return self
        return replace(earlier, machine=self.machine)

    def rates(self, engine: str) -> list[float]:
        """Output tokens per second, for each number of requests."""
        return [self.output_tokens[key] / self.speed[engine].seconds(key) for key in self.workloads]


def print_report(report: QuantisationReport) -> None:
    """Print tables of at most 80 columns."""
    if report.quality:
        header = ["scheme", "method", "bits", "KL, nats", "top-1", "ppl", "recall"]
        rows = []
        for one in report.quality:
            recall = "-" if one.recall is None else f"{one.recall:.3f}"
            costs = [f"{one.kl:#.2g}" if one.kl else "0", f"{one.agreement:.3f}", f"{one.perplexity:.4f}", recall]
            rows.append([one.scheme, one.method, f"{one.bits:.2f}", *costs])
        print_table(f"{report.model}: rounded weights compared with float32, on {report.texts}", header, rows)
    if report.memory:
        header = ["engine", "peak memory, GB", f"blocks in {report.memory_bytes / GIB:g} GiB", "bytes of a block"]
        rows = [
            [name, f"{one.peak_bytes / 1e9:.3f}", f"{one.num_blocks:,}", f"{one.block_bytes:,}"]
            for name, one in report.memory.items()
        ]
        print_table(f"{report.model}: a process without its pool, and the blocks that fit beside it", header, rows)
    if report.speed:
        first, rows = report.rates(next(iter(report.speed))), []
        for name, result in report.speed.items():
            rates = [f"{rate:,.0f} {rate / base:.2f}x" for rate, base in zip(report.rates(name), first, strict=True)]
            rows.append([name, *rates, _others(result)])
        header = ["requests", *report.workloads, "others"]
        print_table(f"{report.model}: tokens/s by number of requests; cores kept busy by others", header, rows)
    for name, reason in report.left_out.items():
        print(f"left out: {name}: {reason}")


def _others(one: PeerResult) -> str:
    beside = [run.others_cores for runs in one.runs.values() for run in runs if run.others_cores is not None]
    return f"{median(beside):.1f}" if beside else "-"


def quantisation_figure(report: QuantisationReport) -> Picture:
    """KL over bits per weight (left), tokens per second over requests (right); what was not measured is left out."""
    figure = new_picture(6.0 * bool(report.quality) + 6.4 * bool(report.speed), 4.2)
    places = iter(figure.subplots(1, bool(report.quality) + bool(report.speed), squeeze=False)[0])
    if report.quality:
        _draw_quality(next(places), [one for one in report.quality if one.kl > 0])
    if report.speed:
        axes = next(places)
        schemes = list(dict.fromkeys(map(_scheme, report.speed)))  # each gets a colour
        for name in report.speed:
            style = "--" if "bfloat16" in name else ":" if "llama.cpp" in name else "-"
            colour = _COLOURS[schemes.index(_scheme(name)) % len(_COLOURS)]
            axes.plot([*report.workloads], report.rates(name), f"o{style}", color=colour, label=name, markersize=4)
        log_heights(axes)
        tidy_axes(axes, title="output tokens per second", labelsize=8)
        axes.set_xlabel("requests at once", fontsize=8.5, color=INK)
        # Beside the axes, as lines of many engines leave no room between them.
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=7.5, handlelength=3)
    figure.suptitle(f"{report.model}: {report.texts}" if report.quality else report.model, fontsize=9.5, color=INK)
    return figure


def _scheme(engine: str) -> str:
    """
    >>> _scheme("w8a16 bfloat16"), _scheme("bfloat16")
    ('w8a16', '')
    """
    return engine.removesuffix("bfloat16").removesuffix("float32").strip()


def _draw_quality(axes: Any, rows: list[Quality]) -> None:
    for method, mark in _MARKS.items():
        some = [one for one in rows if one.method == method]
        if some:
            colour = _COLOURS[1 + list(_MARKS).index(method)]
            axes.plot(
                [one.bits for one in some], [one.kl for one in some], mark, color=colour, label=method, alpha=0.85
            )
    _name_points(axes, [one for one in rows if one.method in ("rtn", "llama.cpp")])
    axes.set_yscale("log")
    tidy_axes(axes, title="KL to float32, nats per token", labelsize=8)
    axes.margins(x=0.18)
    axes.set_xlabel("bits per weight, with scales and zero points", fontsize=8.5, color=INK)
    axes.legend(loc="upper right", frameon=False, fontsize=8)


def _name_points(axes: Any, rows: list[Quality]) -> None:
    """Each scheme's name beside its point, moved down where another name is near."""
    names: list[tuple[float, float]] = []  # bits and log10 of KL
    for one in sorted(rows, key=lambda one: one.kl, reverse=True):
        side = 1 if one.bits < LEFT_BITS else -1
        height = min([math.log10(one.kl), *(other - LINE for bits, other in names if abs(bits - one.bits) < NEAR_BITS)])
        names.append((one.bits, height))
        axes.annotate(
            one.scheme,
            (one.bits, one.kl),
            (one.bits + side * AWAY_BITS, 10**height),
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=6.5,
            color=INK,
            # from the point to the beginning of the name; a line to its middle would cross it out
            arrowprops={
                "arrowstyle": "-",
                "color": LINE_COLOUR,
                "linewidth": 0.7,
                "relpos": (0 if side > 0 else 1, 0.5),
            },
        )
