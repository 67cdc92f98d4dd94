"""Few bits: the grid that weights are rounded to, codes in a word, and tables of large and small values."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as ReadOnlyList

import torch
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

from paged_infer.viz.style import FAINT, INK, Picture, new_picture

from .charts import BLUE, COLOURS, ORANGE


def number_lines(weights: torch.Tensor, grids: Mapping[str, tuple[int, float, float]], bits: int) -> Picture:
    """A number line for each grid: its codes below their values, and an arrow from each weight to the nearest.

    Args:
        grids: by name, the lowest code, the scale, and the code that stands for 0.
    """
    picture = new_picture(7, 1.35 * len(grids))
    panels = picture.subplots(len(grids), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, (lowest, scale, zero)) in zip(panels, grids.items(), strict=True):
        codes = range(lowest, lowest + 2**bits)
        values = [(code - zero) * scale for code in codes]
        axes.axhline(0, color=FAINT, zorder=0)
        axes.plot(values, [0] * len(values), "|", color=INK, markersize=14)
        for code, value in zip(codes, values, strict=True):
            axes.text(value, -0.75, f"{code}", ha="center", va="center", fontsize=9, color=INK)
        for weight in weights.tolist():
            nearest = min(values, key=lambda value: abs(value - weight))
            axes.annotate("", (nearest, 0.05), (weight, 0.8), arrowprops={"arrowstyle": "->", "color": ORANGE})
            axes.plot([weight], [0.85], "o", color=BLUE, markersize=5)
        axes.set(ylim=(-1.2, 1.2), yticks=[])
        axes.set_title(name, fontsize=9, loc="left")
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
    panels[-1].set_xlabel("weight (blue), and below each value of the grid its code")
    return picture


def packed_words(rows: Mapping[str, ReadOnlyList[ReadOnlyList[tuple[str, int]]]], bits: int = 4) -> Picture:
    """Words from their highest bit to the lowest; a row for each format, with its words of (name, code) in order."""
    picture = new_picture(7, 0.75 * len(rows) + 0.5)
    axes = picture.subplots()
    for height, words in enumerate(rows.values()):
        start = 0.0
        for word in words:
            for place, (name, code) in enumerate(reversed(word)):
                box = (start + place * bits, height + 0.12), bits, 0.76
                axes.add_patch(
                    Rectangle(*box, facecolor=COLOURS[int(name) % 4], alpha=0.45, edgecolor="white", linewidth=2)
                )
                text = f"w{name}\n{code:0{bits}b}"
                axes.text(start + (place + 0.5) * bits, height + 0.5, text, ha="center", va="center", fontsize=8)
            start += len(word) * bits + 1
    axes.set_yticks([height + 0.5 for height in range(len(rows))], rows)
    most = max(sum(len(word) * bits + 1 for word in words) for words in rows.values())
    axes.set(xlim=(-0.2, most), ylim=(len(rows), 0), xticks=[], title="a word of 32 bits, its highest bit at the left")
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    return picture


def magnitudes(named: Mapping[str, torch.Tensor], xlabel: str, ylabel: str, height: float = 2.8) -> Picture:
    """Tables side by side on one logarithmic scale of |value|: light is small, dark is large."""
    picture = new_picture(7, height)
    panels = picture.subplots(1, len(named), squeeze=False)[0]
    most = max(values.abs().max().item() for values in named.values())
    for axes, (name, values) in zip(panels, named.items(), strict=True):
        shown = values.detach().abs().clamp(min=most / 1000).cpu()
        image = axes.imshow(shown, cmap="Blues", norm=LogNorm(most / 1000, most), aspect="auto", interpolation="none")
        axes.set_title(name, fontsize=9)
        axes.set(xlabel=xlabel)
        axes.grid(False)
    panels[0].set_ylabel(ylabel)
    picture.colorbar(image, ax=list(panels), label="|value|")
    return picture
