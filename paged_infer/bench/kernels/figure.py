"""The kernels' pictures: how near to the chip's arithmetic a prefill comes, and how near to its memory a decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from paged_infer.bench.kernels.report import KernelReport, Measurement
from paged_infer.viz.style import BASELINE_COLOURS, INK, Picture, new_picture, tidy_axes

OURS = {"flash_attention": "#173f5f", "paged_attention": BASELINE_COLOURS["paged"]}
PEERS = {
    "SDPA flash": "#c1666b",
    "SDPA cuDNN": "#e0a458",
    "flex_attention": "#7a9e7e",
    "varlen_attn": "#8d8fb0",
    "varlen_attn, paged": "#b9a6c9",
    "flashinfer": "#5aa9a4",
    "flashinfer, paged": "#9cc9c5",
    "gather + SDPA": "#9aa3b0",
}

Value = Callable[[Measurement, str], float | None]


def prefill_figure(report: KernelReport) -> Picture:
    """TFLOP/s against the sequence's length, a panel for each head_dim; dotted: the chip's matmul.

    Raises:
        ValueError: the report holds no prefill that ran.
    """
    dims = sorted({m.sizes["head_dim"] for m in _run(report, "prefill")}, reverse=True)
    figure = new_picture(7.8, 3.5)
    for number, (axes, head_dim) in enumerate(zip(_panels(figure, len(dims)), dims, strict=True)):
        comparisons = report.group("prefill", head_dim=head_dim)
        _lines(axes, comparisons, "length", lambda m, name: _scaled(m.rate(name), 1e12))
        if report.roofline is not None:
            _limit(axes, report.roofline.matmul_flops_per_s / 1e12, "a matmul of 8192³" if number == 0 else "")
        axes.set_title(f"head_dim {head_dim}", fontsize=9, color=INK, loc="left")
    _finish(figure, report, "causal prefill: TFLOP/s", "tokens in a sequence")
    return figure


def decode_figure(report: KernelReport) -> Picture:
    """Keys and values read per second over the bytes that a copy moves, against context, a panel for each batch size.

    Raises:
        ValueError: the report holds no decode that ran.
    """
    batches = sorted({m.sizes["batch"] for m in _run(report, "decode")})
    figure = new_picture(7.8, 3.3)
    for number, (axes, batch) in enumerate(zip(_panels(figure, len(batches)), batches, strict=True)):
        comparisons = report.group("decode", batch=batch)
        _lines(axes, comparisons, "context", lambda m, name: _scaled(report.share_of_copy(m, name), 0.01))
        _limit(axes, 100.0, "a copy" if number == 0 else "")
        axes.set_title(f"batch {batch}", fontsize=9, color=INK, loc="left")
    _finish(figure, report, "decode, keys and values read: % of a copy's bytes per second", "tokens in the cache")
    return figure


def _run(report: KernelReport, group: str) -> list[Measurement]:
    comparisons = [m for m in report.group(group) if any(entry.seconds is not None for entry in m.entries)]
    if not comparisons:
        raise ValueError(f"this report holds no {group} that ran: nothing to draw")
    return comparisons


def _panels(figure: Picture, number: int) -> Sequence[Axes]:
    panels: Sequence[Axes] = figure.subplots(1, number, sharey=True, squeeze=False)[0]
    return panels


def _lines(axes: Axes, comparisons: list[Measurement], size: str, value: Value) -> None:
    """A line for each kernel that ran at one size at least; ours last, on top."""
    for name in [*PEERS, *OURS]:
        points = [(m.sizes[size], value(m, name)) for m in sorted(comparisons, key=lambda m: m.sizes[size])]
        known = [(x, y) for x, y in points if y is not None]
        if not known:
            continue
        is_ours = name in OURS
        axes.plot(
            [x for x, _ in known],
            [y for _, y in known],
            "o-" if len(known) > 2 else "o:",
            color=OURS[name] if is_ours else PEERS[name],
            linewidth=2.2 if is_ours else 1.2,
            markersize=4.5 if is_ours else 3.0,
            label=name,
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({m.sizes[size] for m in comparisons})
    axes.set_xticks(ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else f"{tick:,}" for tick in ticks])
    axes.minorticks_off()


def _limit(axes: Axes, height: float, name: str) -> None:
    """What the chip can do at most, measured; named below its line."""
    axes.axhline(height, color=INK, linewidth=0.9, linestyle=":")
    axes.annotate(name, (0.02, height), (0, -10), ("axes fraction", "data"), "offset points", fontsize=8, color=INK)
    axes.set_ylim(top=max(1.05 * height, axes.get_ylim()[1]))


def _finish(figure: Picture, report: KernelReport, title: str, below: str) -> None:
    for axes in figure.axes:
        axes.set_ylim(bottom=0)
        tidy_axes(axes, "top right left", "y", which="both", length=0, labelsize=8, labelcolor=INK)
        axes.spines["bottom"].set_color(INK)
        axes.set_xlabel(below, fontsize=8, color=INK)
    named = {}
    for axes in figure.axes:
        for line, name in zip(*axes.get_legend_handles_labels(), strict=True):
            named[name] = line
    order = [name for name in [*OURS, *PEERS] if name in named]
    figure.legend(
        [named[name] for name in order],
        order,
        loc="outside lower center",
        ncols=min(5, len(order)),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
    )
    figure.suptitle(f"{title}   ({report.machine['device']}, bfloat16, 32 / 8 heads)", fontsize=9.5, color=INK)


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit
