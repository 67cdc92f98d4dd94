"""The elements that attention moves through HBM, counted by the code of ``kernels.attention.online_softmax``."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes

from paged_infer.bench.report import JsonReport
from paged_infer.kernels.attention.online_softmax import naive_attention, tile_sizes, tiled_attention
from paged_infer.viz.style import BASELINE_COLOURS, INK, Picture, new_picture, tidy_axes

STANDARD_COLOUR = BASELINE_COLOURS["static"]
TILE_COLOURS = ("#7db3d8", BASELINE_COLOURS["paged"], "#173f5f")  # the darker, the more fast memory
# Shared memory of one streaming multiprocessor of an H100 (228 KiB, NVIDIA's CUDA programming guide) in 16-bit numbers.
H100_FAST_ELEMENTS = 228 * 1024 // 2

FAST_SWEEP = tuple(2**power for power in range(12, 21))


@dataclass(frozen=True, slots=True)
class TrafficCount:
    """One run: its sizes, and the elements it moved."""

    num_tokens: int  # N queries and N keys
    fast_elements: int | None  # None: the standard algorithm, which writes its scores out
    block_q: int | None
    num_read: int
    num_written: int

    @property
    def num_moved(self) -> int:
        return self.num_read + self.num_written


@dataclass(frozen=True, slots=True)
class TrafficReport(JsonReport):
    """Counts for one head, not causal; ``by_length`` varies N, ``by_memory`` the fast memory at one N."""

    head_dim: int
    by_length: list[TrafficCount]
    by_memory: list[TrafficCount]
    largest_difference: float  # between any two outputs of the same inputs: all runs are the same attention


def count_traffic(
    *,
    head_dim: int = 64,
    lengths: ReadOnlyList[int] = (64, 128, 256, 512, 1024, 2048),
    fast_sizes: ReadOnlyList[int] = (2**12, 2**14, 2**16),
    fixed_length: int = 2048,
    fast_sweep: ReadOnlyList[int] = FAST_SWEEP,
) -> TrafficReport:
    """Run standard and tiled attention on random inputs and keep their counts; about five seconds."""
    differences = [0.0]

    def run(num_tokens: int, sizes: ReadOnlyList[int]) -> list[TrafficCount]:
        generator = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, num_tokens, head_dim, generator=generator)
        standard, traffic = naive_attention(q, k, v)
        counts = [TrafficCount(num_tokens, None, None, traffic.num_read, traffic.num_written)]
        for fast_elements in sizes:
            block_q, block_k = tile_sizes(fast_elements, head_dim)
            out, traffic = tiled_attention(q, k, v, block_q=block_q, block_k=block_k)
            differences.append((out - standard).abs().max().item())
            counts.append(TrafficCount(num_tokens, fast_elements, block_q, traffic.num_read, traffic.num_written))
        return counts

    return TrafficReport(
        head_dim=head_dim,
        by_length=[count for num_tokens in lengths for count in run(num_tokens, fast_sizes)],
        by_memory=run(fixed_length, fast_sweep),
        largest_difference=max(differences),
    )


def save_attention_traffic(folder: Path) -> Path:
    """Count, then write attention_traffic.png and its numbers in attention_traffic.json; returns the picture's path."""
    report = count_traffic()
    picture = folder / "attention_traffic.png"
    report.save(picture.with_suffix(".json"))
    attention_traffic_figure(report).save(picture)
    return picture


def attention_traffic_figure(report: TrafficReport) -> Picture:
    """Elements moved against N (left) and against the fast memory's size (right); pale bands: theory."""
    figure = new_picture(7.8, 3.2)
    by_length, by_memory = figure.subplots(1, 2, sharey=True)
    _length_panel(by_length, report)
    _memory_panel(by_memory, report)
    for axes in (by_length, by_memory):
        tidy_axes(axes, "top right left", which="both", length=0, labelsize=8.5, labelcolor=INK)
        axes.spines["bottom"].set_color(INK)
        axes.minorticks_off()
    title = "elements that attention moves to and from HBM: counted (dots) over theory (bands)"
    figure.suptitle(f"{title}, d = {report.head_dim}", fontsize=9.5, color=INK)
    return figure


def _length_panel(axes: Axes, report: TrafficReport) -> None:
    lengths = sorted({count.num_tokens for count in report.by_length})
    for fast_elements, colour in {None: STANDARD_COLOUR, **_tile_colours(report)}.items():
        moved = [count.num_moved for count in report.by_length if count.fast_elements == fast_elements]
        theory = [_theory(n, report.head_dim, fast_elements) for n in lengths]
        _counted_over_theory(axes, lengths, moved, theory, colour)
        name = "standard" if fast_elements is None else f"tiles, {_binary(fast_elements)}"
        _annotate(axes, name, (lengths[-1], moved[-1]), (7, -1 if fast_elements is None else -5), colour)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.set_xlim(lengths[0] / 1.2, lengths[-1] * 2.9)  # room for the names
    axes.set_title("against tokens N (tiles: by fast memory M)", fontsize=9, color=INK, loc="left")


def _memory_panel(axes: Axes, report: TrafficReport) -> None:
    standard, *tiled = report.by_memory
    N, d = standard.num_tokens, report.head_dim
    sizes = [count.fast_elements or 0 for count in tiled]
    moved = [count.num_moved for count in tiled]
    colours, line_colour = _tile_colours(report), TILE_COLOURS[1]
    _counted_over_theory(axes, sizes, moved, [_theory(N, d, size) for size in sizes], line_colour, "-")
    for size, count in zip(sizes, moved, strict=True):
        axes.loglog(size, count, "o", color=colours.get(size, line_colour), markersize=5)
    axes.axhline(standard.num_moved, color=STANDARD_COLOUR, linewidth=1.6)
    axes.axhline(4 * N * d, color=INK, linewidth=0.8, linestyle=":")
    axes.axvline(H100_FAST_ELEMENTS, ymax=0.86, color=INK, linewidth=0.8, linestyle=":")
    _annotate(axes, "standard, Θ(N² + N d)", (sizes[-1], standard.num_moved), (0, 5), STANDARD_COLOUR, "right")
    _annotate(axes, "tiles, Θ(N²d²/M)", (sizes[0], moved[len(moved) // 3]), (0, -6), line_colour)
    _annotate(axes, "inputs and output once, 4 N d", (sizes[0], 4 * N * d), (0, 5), INK)
    _annotate(axes, "one SM of an H100,\n16-bit numbers", (H100_FAST_ELEMENTS, N * d / 4), (5, 0), INK)
    axes.set_xticks(sizes[::2], [_binary(size) for size in sizes[::2]])
    axes.set_title(f"against fast memory M, in elements (N = {N:,})", fontsize=9, color=INK, loc="left")


def _counted_over_theory(
    axes: Axes, xs: list[int], moved: list[int], theory: list[float], colour: str, style: str = "o-"
) -> None:
    axes.loglog(xs, theory, "-", color=colour, linewidth=5.0, alpha=0.2, solid_capstyle="butt")
    axes.loglog(xs, moved, style, color=colour, markersize=4, linewidth=1.6)


def _theory(N: int, d: int, fast_elements: int | None) -> float:
    """Dao 2022, theorem 2, with the constants of this code: N^2 + N d four times; N^2 d^2 / M ten times."""
    return 4 * (N * N + N * d) if fast_elements is None else 10 * N * N * d * d / fast_elements


def _tile_colours(report: TrafficReport) -> dict[int | None, str]:
    sizes = sorted({count.fast_elements for count in report.by_length if count.fast_elements})
    return {size: TILE_COLOURS[i % len(TILE_COLOURS)] for i, size in enumerate(sizes)}


def _annotate(
    axes: Axes, text: str, at: tuple[float, float], offset: tuple[int, int], colour: str, align: str = "left"
) -> None:
    axes.annotate(text, at, offset, textcoords="offset points", color=colour, fontsize=8.5, horizontalalignment=align)


def _binary(num_elements: int) -> str:
    """4096 as "4 Ki"."""
    for unit, size in (("Mi", 2**20), ("Ki", 2**10)):
        if num_elements % size == 0:
            return f"{num_elements // size} {unit}"
    return f"{num_elements:,}"
