"""``paged-infer bench kernels``: checked first, then timed. Also ``python -m paged_infer.bench.kernels.cli``.

The latter needs typer and not rich, for a machine that only measures (``make gpu``).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from paged_infer.bench.tables import print_table
from paged_infer.cli_options import RESULTS
from paged_infer.terminal import CommandLine

if TYPE_CHECKING:
    import torch

    from paged_infer.bench.kernels.compile_table import CompiledRow
    from paged_infer.bench.kernels.report import KernelReport, Measurement


def kernels(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compile_only: Annotated[bool, typer.Option(help="Compile every variant, for chips that may be absent.")] = False,
    arch: Annotated[
        list[int] | None, typer.Option(help="With --compile-only: chip, 90 for sm90; default 80, 90 and 100.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="With --compile-only: each kernel once or twice, a tenth of all variants.")
    ] = False,
    sweep: Annotated[
        bool, typer.Option(help="Try other tiles and split rules for attention, and write a table of those that win.")
    ] = False,
    time_limit: Annotated[
        float, typer.Option(help="Seconds; timings that have not begun by then are left out.", min=0)
    ] = 900,
    figures: Annotated[Path, typer.Option(help="Folder for numbers and pictures.")] = RESULTS,
) -> None:
    """The Triton kernels: checked against float64, then timed with torch, flex_attention, varlen_attn and flashinfer.

    On a CPU they are interpreted: checked on small shapes, and not timed. Exits with status 1 if a kernel is wrong or
    did not run, or (--compile-only) if a variant spills registers or exceeds its chip's shared memory.
    --sweep times tiles and split rules beside those in use instead, and writes the winners as tiles-sm<arch>.json.
    """
    if sweep and compile_only:
        _refuse("--sweep does not go with --compile-only")
    if compile_only:
        _compile_only(quick, arch, figures / "kernels-compiled.json")
        return
    if quick or arch:
        _refuse("--quick and --arch go with --compile-only")
    chosen = _choose(device)
    if sweep:
        from paged_infer.bench.kernels.sweep_cli import run_sweep

        run_sweep(chosen, time_limit, figures)
    else:
        _bench(chosen, time_limit, figures)


def _choose(name: str) -> torch.device:
    """The device to run on, if kernels run there."""
    import torch

    from paged_infer.kernels.triton_runtime import HAS_TRITON, can_run_on

    has_gpu = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda"):
        _refuse(f"device={name!r}: must be auto, cpu or cuda")
    if name == "cuda" and not has_gpu:
        _refuse("device='cuda': there is no CUDA device here")
    if not HAS_TRITON:
        _refuse("triton is not installed: there are no kernels to run")
    device = torch.device("cuda" if has_gpu and name != "cpu" else "cpu")
    if not can_run_on(device):
        needed = 1 if device.type == "cpu" else 0
        _refuse(f"triton cannot run on {device} in this process: start it with TRITON_INTERPRET={needed}")
    return device


def _refuse(message: str) -> NoReturn:
    """One line on standard error, and exit status 2."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


# -- Compiled for chips that are not here ----------------------------------------------------------------------------


def _compile_only(quick: bool, arch: list[int] | None, path: Path) -> None:
    from paged_infer.bench.kernels.compile_table import CHIPS, compile_table, save_table
    from paged_infer.bench.kernels.variants import QUICK
    from paged_infer.kernels.ahead_of_time import SHARED_LIMIT
    from paged_infer.kernels.triton_runtime import HAS_TRITON

    if not HAS_TRITON:
        _refuse("triton is not installed: it is what compiles the kernels")
    chips = list(dict.fromkeys(arch or CHIPS))
    if unknown := [chip for chip in chips if chip not in SHARED_LIMIT]:
        _refuse(f"arch={unknown[0]}: known chips are {', '.join(map(str, SHARED_LIMIT))}")
    start_s = time.perf_counter()
    try:
        rows = compile_table(QUICK if quick else None, chips)
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    save_table(rows, path)
    header = (
        "variant",
        "kernel",
        "registers",
        "spilled",
        "shared",
        "warps",
        "stages",
        "blocks/SM",
        "buffers",
        "in flight",
    )
    for chip in dict.fromkeys(row.arch for row in rows):
        of_chip = [row for row in rows if row.arch == chip]
        limit = max(row.shared_limit for row in of_chip)
        title = f"sm{chip}: registers and spilled bytes of a thread, shared bytes of a block (limit {limit:,})"
        print_table(
            title, header, [_cells(row) for row in of_chip], ["bold red" if row.problem else "" for row in of_chip]
        )
    unclean = [row for row in rows if row.problem]
    for row in unclean:
        print(f"sm{row.arch} {row.variant} ({row.kernel}): {row.problem}")
    print(f"{len(rows)} kernels in {time.perf_counter() - start_s:.0f} s, {len(unclean)} not clean; table: {path}")
    if unclean:
        raise typer.Exit(1)


def _cells(row: CompiledRow) -> tuple[str, ...]:
    sizes = (row.registers, row.spill_bytes, f"{row.shared_bytes:,}", row.num_warps, row.num_stages, row.blocks_per_sm)
    waits = " ".join("-" if left is None else str(left) for left in row.in_flight)
    return (row.variant, row.kernel, *map(str, sizes), str(row.kv_buffers or ""), waits)


# -- Run here --------------------------------------------------------------------------------------------------------


def _bench(device: torch.device, time_limit: float, figures: Path) -> None:
    from paged_infer.bench.kernels.attention_traffic import save_attention_traffic
    from paged_infer.bench.kernels.checks import run_checks
    from paged_infer.bench.kernels.launches import count_store_calls
    from paged_infer.bench.kernels.report import KernelReport
    from paged_infer.bench.roofline import measure
    from paged_infer.execution.machine import describe_machine, machine_line
    from paged_infer.kernels.triton_runtime import triton

    deadline_s = time.perf_counter() + time_limit
    on_gpu = device.type == "cuda"
    report = KernelReport(device.type, describe_machine() | {"triton": triton.__version__})
    how = "compiled" if on_gpu else "interpreted: small shapes, not timed"
    print(f"on {device.type}: {machine_line(report.machine)}, triton {triton.__version__}")
    print(f"kernels are {how}", flush=True)

    path = figures / ("bench-kernels.json" if on_gpu else "bench-kernels-cpu.json")
    if on_gpu:
        report.roofline = measure(device)
        report.save(path)
    report.checks.extend(run_checks(device))
    report.save(path)
    _show_checks(report)
    report.launches.extend(count_store_calls())
    report.save(path)
    _show_launches(report)
    if on_gpu:
        _run_comparisons(report, device, deadline_s, f"the time limit of {time_limit:g} s", path)
    else:
        print(f"what attention moves, counted: {save_attention_traffic(figures)}")
    print(f"numbers: {path}", flush=True)
    _exit_if_wrong(report)


def _exit_if_wrong(report: KernelReport) -> None:
    """Status 1 if a kernel of ours is wrong or did not run."""
    if errors := [
        f"{c.kernel} ({c.case}: {c.error:.2g}, allowed {c.tolerance:.2g})" for c in report.checks if not c.passed
    ]:
        typer.echo(f"error: differs from float64: {', '.join(errors)}", err=True)
    if report.failures():
        typer.echo("error: did not run: " + "; ".join(report.failures()), err=True)
    if errors or report.failures():
        raise typer.Exit(1)


def _run_comparisons(report: KernelReport, device: torch.device, deadline_s: float, limit: str, path: Path) -> None:
    """Time what is right; save the report after each timing, so that no number is lost if the next ends the process."""
    from paged_infer.bench.kernels.comparisons import (
        attention_comparisons,
        coded_comparisons,
        fused_comparisons,
        linear_comparisons,
        run_comparisons,
    )
    from paged_infer.bench.kernels.figure import decode_figure, prefill_figure

    wrong = {check.kernel for check in report.checks if not check.passed}
    planned = (
        *attention_comparisons(device),
        *coded_comparisons(device),
        *linear_comparisons(device),
        *fused_comparisons(device),
    )
    comparisons = [one.without(wrong) for one in planned]
    for measurement in run_comparisons(comparisons, deadline_s, limit):
        if report.record(measurement):
            print(f"{time.strftime('%H:%M:%S')} {measurement.title}", flush=True)
        report.save(path)
    _show_comparisons(report)
    for name, draw in (("prefill", prefill_figure), ("decode", decode_figure)):
        try:
            draw(report).save(path.with_name(f"bench-kernels-{name}.png"))
        except ValueError as error:
            print(f"no picture of {name}: {error}")


def _show_checks(report: KernelReport) -> None:
    dtypes = ("float32", "float16", "bfloat16")
    rows = []
    for kernel in dict.fromkeys(check.kernel for check in report.checks):
        mine = [check for check in report.checks if check.kernel == kernel]
        worst = [max((c.error for c in mine if c.case.startswith(t)), default=None) for t in dtypes]
        right = "yes" if all(check.passed for check in mine) else "NO"
        rows.append((kernel, *("-" if x is None else f"{x:.1e}" for x in worst), str(len(mine)), right))
    title = "against float64: the largest |out - exact| / (1 + |exact|)"
    marks = ["bold red" if row[-1] == "NO" else "" for row in rows]
    print_table(title, ("kernel", *dtypes, "cases", "right"), rows, marks)


def _show_launches(report: KernelReport) -> None:
    from paged_infer.bench.kernels.launches import STEP

    rows = [(c.name, *(_number(n, 1, 0) for n in (c.aten_operations, c.launches))) for c in report.launches]
    title = f"storing one decode step, {STEP} (-: not counted)"
    print_table(title, ("stored by", "ATen operations", "launches"), rows)


def _show_comparisons(report: KernelReport) -> None:
    for group, by, along, what in (
        ("prefill", "head_dim", "length", "TFLOP/s, 4 * heads * head_dim * tokens * length / 2"),
        ("decode", "batch", "context", "GB/s of keys and values read, and their share of a copy's"),
    ):
        for value in sorted({m.sizes[by] for m in report.group(group)}):
            comparisons = sorted(report.group(group, **{by: value}), key=lambda m: m.sizes[along])
            names = dict.fromkeys(entry.name for m in comparisons for entry in m.entries)
            rows = [(name, *(_speed(report, m, name) for m in comparisons)) for name in names]
            header = ("", *(f"{m.sizes[along]:,}" for m in comparisons))
            print_table(f"{group}, {by} {value}, by {along}: {what}", header, rows)
    rows = [
        (m.title, entry.name, _number(entry.seconds, 1e-6), _number(m.rate(entry.name), 1e9), entry.note)
        for m in report.group("fused")
        for entry in m.entries
        if entry.seconds is not None
    ]
    print_table("fused pieces; GB/s: each number read and written once", ("", "by", "us", "GB/s", "timed"), rows)
    for group, what in (
        ("decode_8_bits", "decodes over an 8-bit KV cache compared with bfloat16"),
        ("linear", "linear layers: quantised weights compared with bfloat16"),
    ):
        rows = [
            (
                m.title,
                *(_number(e.seconds, 1e-6) for e in m.entries),
                _number(m.ratio(*(e.name for e in m.entries)), 1, 2),
            )
            for m in report.group(group)
        ]
        print_table(what, ("", "us", "bfloat16, us", "times"), rows)
    for name, why in report.absences():
        print(f"{name}: {why}")
    wanted = [(reach.what, f"{reach.wanted:.2f}", _number(reach.measured, 1, 2)) for reach in report.reaches()]
    print_table("targets", ("", "wanted", "measured, at worst"), wanted)


def _speed(report: KernelReport, m: Measurement, name: str) -> str:
    rate, share = m.rate(name), report.share_of_copy(m, name)
    if m.group == "prefill" or rate is None or share is None:
        return _number(rate, 1e12)
    return f"{rate / 1e9:,.0f} {share:.0%}"


def _number(value: float | None, unit: float, digits: int = 1) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"


if __name__ == "__main__":
    app = CommandLine(add_completion=False, pretty_exceptions_enable=False)
    app.command()(kernels)
    app()
