"""The kernels' pictures: how near to the chip's arithmetic a prefill comes, and how near to its memory a decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

Value = Callable[[Measurement, str], tuple[float | None, float]]  # and its unit


def prefill_figure(report: KernelReport) -> Picture:
    """TFLOP/s against the sequence's length, a panel for each head_dim; dotted: the chip's matmul.

    Raises:
        ValueError: the report holds no prefill that ran.
    """
    height = None if report.roofline is None else report.roofline.matmul_flops_per_s / 1e12
    figure = new_picture(7.8, 3.5)
    _panels(figure, report, "prefill", "head_dim", "length", lambda m, name: (m.rate(name), 1e12))
    _finish(figure, report, "causal prefill: TFLOP/s", "tokens in a sequence", (height, "a matmul of 8192³"))
    return figure


def decode_figure(report: KernelReport) -> Picture:
    """Keys and values read per second over the bytes that a copy moves, against context, a panel for each batch size.

    Raises:
        ValueError: the report holds no decode that ran.
    """
    figure = new_picture(7.8, 3.3)
    _panels(figure, report, "decode", "batch", "context", lambda m, name: (report.share_of_copy(m, name), 0.01))
    title = "decode, keys and values read: % of a copy's bytes per second"
    _finish(figure, report, title, "tokens in the cache", (100, "a copy"))
    return figure


def _panels(figure: Picture, report: KernelReport, group: str, by: str, along: str, value: Value) -> None:
    """A panel for each size ``by`` at which a kernel ran, with lines along another size."""
    ran = {m.sizes[by] for m in report.group(group) if any(entry.seconds is not None for entry in m.entries)}
    if not ran:
        raise ValueError(f"this report holds no {group} that ran: nothing to draw")
    sizes = sorted(ran, reverse=by == "head_dim")
    for axes, size in zip(figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0], sizes, strict=True):
        comparisons = sorted(report.group(group, **{by: size}), key=lambda m: m.sizes[along])
        _lines(axes, {m.sizes[along]: m for m in comparisons}, value)
        axes.set_title(f"{by} {size}", fontsize=9, color=INK, loc="left")


def _lines(axes: Axes, comparisons: dict[int, Measurement], value: Value) -> None:
    """A line for each kernel that ran at one size at least; ours last, on top."""
    for name, colour in (PEERS | OURS).items():
        values = {size: value(m, name) for size, m in comparisons.items()}
        points = {size: number / unit for size, (number, unit) in values.items() if number is not None}
        if points:
            width, marker = (2.2, 4.5) if name in OURS else (1.2, 3.0)
            style: dict[str, Any] = {"color": colour, "linewidth": width, "markersize": marker, "label": name}
            axes.plot([*points], [*points.values()], "o-" if len(points) > 2 else "o:", **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks([*comparisons], [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in comparisons])
    axes.minorticks_off()


def _finish(figure: Picture, report: KernelReport, title: str, below: str, limit: tuple[float | None, str]) -> None:
    """Axes, legend and title, and the limit of the chip: a height, and what is so fast."""
    named: dict[str, Any] = {}
    height, name = limit
    for axes in figure.axes:
        axes.set_ylim(bottom=0)
        if height is not None:
            axes.axhline(height, color=INK, linewidth=0.9, linestyle=":")
            axes.set_ylim(top=max(1.05 * height, axes.get_ylim()[1]))
        tidy_axes(axes, "top right left", "y", which="both", length=0, labelsize=8, labelcolor=INK)
        axes.spines["bottom"].set_color(INK)
        axes.set_xlabel(below, fontsize=8, color=INK)
        named |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = [label for label in OURS | PEERS if label in named]
    style: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 8, "labelcolor": INK}
    figure.legend([named[label] for label in order], order, ncols=min(5, len(order)), **style)
    figure.suptitle(f"{title}   ({report.machine['device']}, bfloat16, 32 / 8 heads)", fontsize=9.5, color=INK)
    if height is not None:  # named once, below its line
        where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        figure.axes[0].annotate(name, (0.02, height), (0, -10), fontsize=8, color=INK, **where)
