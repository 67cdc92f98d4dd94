"""Speed reports on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable

from paged_infer.bench.metrics import Metrics, Percentiles
from paged_infer.bench.speed.measure import ENGINE, Entry, SpeedReport
from paged_infer.bench.speed.step_parts import PARTS, StepReport
from paged_infer.bench.tables import print_table

UNKNOWN = "-"
FIRST_COLUMN = {"load": "load", "serve": "load", "speculation": "load", "ladder": "baseline"}


COLUMNS: dict[str, Callable[[Metrics], str]] = {
    "seconds": lambda m: f"{m.seconds:.2f}",
    "output tok/s": lambda m: f"{m.output_tokens_per_s:,.0f}",
    "total tok/s": lambda m: UNKNOWN if m.total_tokens_per_s is None else f"{m.total_tokens_per_s:,.0f}",
    "MBU": lambda m: _share(m.mbu),
    "MFU": lambda m: _share(m.mfu),
    "of floor": lambda m: _share(m.floor_share),
    "overhead": lambda m: _share(m.overhead_share),
    "KV MiB": lambda m: UNKNOWN if m.peak_kv_bytes is None else f"{m.peak_kv_bytes / 2**20:,.1f}",
    "holds tokens": lambda m: _share(m.kv_fill),
}
TIMES = {
    "TTFT": "ttft_s",
    "end of reasoning": "reasoning_s",
    "first content": "ttfc_s",
    "TPOT": "tpot_s",
    "ITL": "itl_s",
    "latency": "latency_s",
    "event loop late": "loop_delay_s",
}


def print_speed(report: SpeedReport) -> None:
    """The metrics of every entry, then ratios, the floor, and where the engine's time went."""
    random_weights = ", random weights" * (report.load_format == "dummy")
    title = (
        f"{report.model} ({report.dtype}{random_weights}): {report.workload}\n"
        f"seed {report.seed}, {report.num_prompt_tokens:,} tokens in, {report.num_output_tokens:,} out; "
        f"medians of {report.repeats} interleaved runs{', INCOMPLETE' * (not report.is_complete)}"
    )
    rows, times, marks = [], [], []
    for entry in report.entries:
        if entry.first is not None:
            name = f"{entry.name}, first run"
            rows.append((name, *_cells(entry.first), "", "", ""))
            times.append((name, *_times(entry.first)))
            marks.append("dim")
        rows.append(
            (entry.name, *_cells(entry.metrics), _num_runs(entry, report), _yes(entry.same_counts), _same(entry))
        )
        times.append((entry.name, *_times(entry.metrics)))
        marks.append("" if entry.is_right else "bold red")
    first = FIRST_COLUMN.get(report.command, "system")
    _print_known(title, (first, *COLUMNS, "runs", "all tokens", "same tokens"), rows, marks)
    _print_known("milliseconds: p50 / p90 / p99", (first, *TIMES), times, marks)
    if report.command == "speculation":
        _print_drafts(report)
    ratios = [_ratio_line(*pair) for pair in _compared(report)]
    for line in ratios + _token_lines(report) + _floor_lines(report) + _span_lines(report) + report.notes:
        print(line)
    sys.stdout.flush()


def _print_known(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]], marks: list[str]) -> None:
    """The table without the columns in which nothing is known."""
    shown = [n for n in range(len(header)) if n == 0 or any(row[n] not in (UNKNOWN, "") for row in rows)]
    print_table(title, [header[n] for n in shown], [[row[n] for n in shown] for row in rows], marks)


def _cells(metrics: Metrics) -> list[str]:
    return [show(metrics) for show in COLUMNS.values()]


def _times(metrics: Metrics) -> list[str]:
    return [_ms(getattr(metrics, name)) for name in TIMES.values()]


def _ms(times: Percentiles | None) -> str:
    """One number where there is one request."""
    if times is None:
        return UNKNOWN
    values = [times.p50] if times.p50 == times.p99 else [times.p50, times.p90, times.p99]
    return " / ".join(f"{1e3 * s:,.{0 if s >= 0.1 else 1}f}" for s in values)


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.1%}"


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _num_runs(entry: Entry, report: SpeedReport) -> str:
    """The number of runs, if it is smaller than asked for."""
    asked = report.repeats
    return UNKNOWN if len(entry.runs_s) >= asked else f"{len(entry.runs_s)} of {asked}"


def _same(entry: Entry) -> str:
    if entry.same_tokens is None:
        return UNKNOWN
    is_tie = not entry.same_tokens and entry.compared is not None and entry.compared.is_right
    return "near ties" if is_tie else _yes(entry.same_tokens)


def _token_lines(report: SpeedReport) -> list[str]:
    """By how much tokens differ, where they do."""
    compared = [(entry.name, entry.compared) for entry in report.entries if entry.compared is not None]
    return [f"{name}: {comparison.line()}" for name, comparison in compared if not comparison.is_same]


def _compared(report: SpeedReport) -> list[tuple[Entry, Entry]]:
    """Pairs of entries: what is compared, and to what."""
    entries = report.entries
    if report.command == "load":
        return []
    if report.command == "serve":  # the most clients of each closed loop, to the same requests without HTTP
        closed = [one for one in entries if "client" in one.name]
        most = max(one.load or 0.0 for one in closed)
        return [(one, other) for other in entries if other.load is None for one in closed if one.load == most]
    if report.command == "speculation":  # each method to none, on as many requests
        plain = {entry.load: entry for entry in entries if entry.series == entries[0].series}
        return [(entry, plain[entry.load]) for entry in entries if entry is not plain[entry.load]]
    if report.command == "optimisations":  # each engine to the one before, and the last to the first
        return [*zip(entries[1:], entries, strict=False), *[(entries[-1], entries[0])] * (len(entries) > 1)]
    return [(ours, other) for ours in entries if ours.name == ENGINE for other in entries if other is not ours]


def _print_drafts(report: SpeedReport) -> None:
    """Drafts make fewer steps, each with more tokens."""
    rows = []
    for entry in report.entries:
        steps, rate, requests = entry.metrics.num_steps, entry.metrics.acceptance_rate, entry.load or 1.0
        tokens = entry.metrics.output_tokens_per_s * entry.metrics.seconds
        known = [UNKNOWN] * 2 if not steps else [f"{steps:,.0f}", f"{tokens / requests / steps:.2f}"]
        rows.append((entry.name, _share(rate), *known))
    print_table("with drafts", ("load", "accepted", "steps", "tokens a step and request"), rows, [""] * len(rows))


def _ratio_line(ours: Entry, other: Entry) -> str:
    """Of the medians, and the least and most of each pair of consecutive runs."""
    each = [theirs / mine for theirs, mine in zip(other.runs_s, ours.runs_s, strict=False)]  # one may run once
    each = each or [other.metrics.seconds / ours.metrics.seconds]
    ratio = other.metrics.seconds / ours.metrics.seconds
    return f"{ours.name} / {other.name} = {ratio:.2f} ({min(each):.2f} to {max(each):.2f})"


def _floor_lines(report: SpeedReport) -> list[str]:
    roof = report.roofline
    if roof is None:
        return []
    lines = [
        f"roofline: copy {roof.copy_bytes_per_s / 1e9:,.1f} GB/s, read {roof.read_bytes_per_s / 1e9:,.1f} GB/s, "
        f"matmul {roof.matmul_flops_per_s / 1e9:,.0f} GFLOP/s ({roof.matmul_dtype})"
    ]
    if report.floor is not None:
        floor = report.floor
        lines.append(
            f"floor: {floor.seconds:.3f} s = prompts {floor.prefill_s:.3f} + decoding {floor.decode_s:.3f}; "
            f"decoding's memory traffic alone {floor.memory_s:.3f} (MBU), all operations {floor.compute_s:.3f} (MFU)"
        )
    return lines


def _span_lines(report: SpeedReport) -> list[str]:
    spent = [entry for entry in report.entries if entry.span_s]
    if not spent:
        return []
    entry = max(spent, key=lambda one: one.metrics.output_tokens_per_s)
    total = sum(entry.span_s.values())
    shares = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in entry.span_s.items())
    return [f"the engine's steps ({entry.name}), host time: {shares}"]


def print_step(report: StepReport) -> None:
    """Milliseconds a step and the share of each part, a column a backend."""
    fewest = min((one.num_runs or report.repeats for one in report.backends), default=0)
    num_runs = f"{report.repeats}" if fewest == report.repeats else f"{fewest} of {report.repeats}"
    title = f"{report.model}: {report.workload}; milliseconds a step, medians of {num_runs} interleaved runs"
    title += ", INCOMPLETE" * (not report.is_complete)
    rows = []
    for place, part in enumerate(PARTS):
        cells = [f"{one.part_ms[place]:.3f} ({one.part_ms[place] / one.step_ms:.0%})" for one in report.backends]
        rows.append((part, *cells))
    rows.append(("the step", *(f"{one.step_ms:.3f}" for one in report.backends)))
    print_table(title, ("part", *(one.backend for one in report.backends)), rows, [""] * len(PARTS) + ["bold"])
