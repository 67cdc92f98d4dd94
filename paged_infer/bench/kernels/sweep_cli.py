"""``paged-infer bench kernels --sweep``: the sweep with its tables printed and its numbers saved while it runs."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import typer

from paged_infer.bench import roofline
from paged_infer.bench.kernels.sweep import CaseResult, SweepReport, Trial, check_interpreted, compile_all, sweep
from paged_infer.bench.kernels.sweep_cases import SPLIT_RULES, candidates, sweep_cases
from paged_infer.bench.tables import print_table
from paged_infer.execution.machine import describe_machine, machine_line
from paged_infer.kernels.attention.tile_table import (
    KERNELS,
    LINEAR_KERNELS,
    AnyKey,
    LinearKey,
    as_key,
    tables,
    write_table,
)
from paged_infer.kernels.triton_runtime import capability, triton


def run_sweep(device: torch.device, time_limit: float, figures: Path) -> None:
    """On CUDA: compile, check, time, and write bench-sweep.json and tiles-sm<arch>.json. On a CPU: check alone.

    Raises:
        typer.Exit: status 1 if a kernel is wrong: on a CPU any candidate, on CUDA today's.
    """
    if device.type == "cpu":
        _check_on_cpu()
    else:
        _sweep(device, time_limit, figures)


def _sweep(device: torch.device, time_limit: float, figures: Path) -> None:
    deadline_s = time.perf_counter() + time_limit
    major, minor = capability(device)
    arch = 10 * major + minor
    cases = sweep_cases()
    machine = describe_machine() | {"triton": triton.__version__}
    report = SweepReport(machine, planned=[[*case.key] for case in cases])
    print(f"on {machine_line(machine)}, triton {triton.__version__}", flush=True)
    try:
        built = compile_all(cases, arch)
        seconds = time.perf_counter() - deadline_s + time_limit
        print(f"{len(built)} candidates compiled in {seconds:.0f} s", flush=True)
    except Exception as error:  # costs time and no results: each candidate is then compiled when it is run
        built = {}
        print(f"not compiled beforehand: {type(error).__name__}: {error}", flush=True)
    report.roofline = roofline.measure(device)
    numbers, table = figures / "bench-sweep.json", figures / f"tiles-sm{arch}.json"
    for result in sweep(cases, device, built, deadline_s, f"the time limit of {time_limit:g} s"):
        if report.record(result):
            report.save(numbers)
        if result.is_finished:
            _show(result, report)
            _write_winners(report, table, arch)
    _show_winners(report)
    print(f"numbers: {numbers}" + (f"   table: {table}" if table.exists() else ""), flush=True)
    wrong = [case.title for case in report.cases if case.today is None and not case.was_left_out]
    if wrong:
        typer.echo(f"error: today's tile did not run, or is wrong: {'; '.join(wrong)}", err=True)
        raise typer.Exit(1)


def _check_on_cpu() -> None:
    print("interpreted: candidates are checked on small shapes, and not timed", flush=True)
    checked = [*check_interpreted()]
    rows = [(case, name, f"{error:.1e}", "yes" if error <= most else "NO") for case, name, error, most in checked]
    marks = ["bold red" if row[-1] == "NO" else "" for row in rows]
    print_table(
        "against float64: the largest |out - exact| / (1 + |exact|)", ("", "candidate", "error", "right"), rows, marks
    )
    wrong = [
        f"{case}: {name} ({error:.2g}, allowed {most:.2g})" for case, name, error, most in checked if not error <= most
    ]
    if wrong:
        typer.echo(f"error: differs from float64: {'; '.join(wrong)}", err=True)
        raise typer.Exit(1)
    total = sum(len(candidates(kernel)) for kernel in (*KERNELS, *LINEAR_KERNELS))
    print(f"{len(checked)} of {total} candidates run here: the interpreter ignores warps and stages")


def _show(result: CaseResult, report: SweepReport) -> None:
    unit = "share of copy" if result.counts_bytes else "TFLOP/s"
    header = ("candidate", "registers", "spilled", "shared", "us", unit, "x today's", "note")
    rows = []
    for trial in sorted(result.trials, key=lambda trial: trial.seconds or float("inf")):
        built = trial.built
        sizes = (
            ("-",) * 3
            if built is None or built.error
            else (built.registers, built.spill_bytes, f"{built.shared_bytes:,}")
        )
        rows.append((trial.name, *map(str, sizes), *_speed(result, trial, report), trial.note))
    print_table(result.title, header, rows)


def _speed(result: CaseResult, trial: Trial, report: SweepReport) -> tuple[str, str, str]:
    gain = result.gain(trial.name)
    if trial.seconds is None:
        return "-", "-", "-"
    rate = result.work / trial.seconds
    speed = f"{rate / 1e12:,.0f}"
    if result.counts_bytes:
        speed = "-" if report.roofline is None else f"{rate / report.roofline.copy_bytes_per_s:.0%}"
    return f"{trial.seconds * 1e6:,.1f}", speed, "-" if gain is None else f"{gain:.3f}"


def _write_winners(report: SweepReport, path: Path, arch: int) -> None:
    """Write the table in use, with the entries of the winners added or replaced; without a winner there is no file."""
    path.unlink(missing_ok=True)
    if won := report.table():
        machine = report.machine
        measured_on = f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, {machine['date']}"
        write_table(path, arch, {**tables().get(arch, {}), **won}, measured_on)


def _show_winners(report: SweepReport) -> None:
    rows = [(_described(as_key(w.key)), w.name, f"{w.gain:.3f}", f"{1 + w.margin:.3f}") for w in report.winners()]
    title = f"winners (splits: {'/'.join(SPLIT_RULES[0]._fields)}); x today's: geometric mean over the batches"
    print_table(title, ("", "candidate", "x today's", "had to exceed"), rows)
    if not rows:
        print("no candidate beats today's tile by more than the noise: no table is written")


def _described(key: AnyKey) -> str:
    if isinstance(key, LinearKey):
        return f"{key.kernel}, {'few' if key.few else 'many'} tokens"
    return f"{key.kernel}, head_dim {key.head_dim}, group {key.group}"
