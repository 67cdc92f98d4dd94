"""One style for all figures: a colour for each baseline, a light background, readable at half size."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.legend_handler import HandlerTuple
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

BASELINE_COLOURS = {
    "naive": "#b0b7c3",
    "cached": "#e0a458",
    "static": "#c1666b",
    "paged": "#2f6f9f",
    "transformers": "#8d8fb0",
    "transformers static": "#b9a6c9",
    "transformers generate_batch": "#7a6a94",
    "nano-vllm": "#6f9f8f",
    "vllm": "#4f7f6a",
    "mini-sglang": "#a3bfa8",
}
INK, FAINT = "#22303c", "#d9dee5"
DPI = 100
SHARPNESS = 2  # dots for each dot of a picture's size, for screens that have as many
NUM_COLOURS = 256  # of a PNG


class Picture(Figure):
    """A figure without a window: the same in scripts, servers and notebooks, where it is shown as a PNG."""

    def save(self, path: Path) -> None:
        """Write a PNG, creating its folder if necessary."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.png())

    def png(self, sharpness: int = SHARPNESS) -> bytes:
        """The picture as a PNG of at most 256 colours, which takes a third of the bytes of all colours.

        ``sharpness``: dots for each dot of its size.
        """
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=sharpness * DPI, pil_kwargs={"compress_level": 0})
        colours = Image.open(buffer).convert("RGB").quantize(NUM_COLOURS, dither=Image.Dither.NONE)
        packed = io.BytesIO()
        colours.save(packed, "PNG", optimize=True)
        return packed.getvalue()

    @property
    def size_px(self) -> dict[str, int]:
        """In which a notebook shows it, however many dots it has."""
        width, height = self.get_size_inches()
        return {"width": round(width * DPI), "height": round(height * DPI)}

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return self.png(), self.size_px


def new_picture(width_in: float = 7.0, height_in: float = 3.0) -> Picture:
    """An empty picture of that size in inches, at 100 dots per inch."""
    return Picture(figsize=(width_in, height_in), dpi=DPI, layout="constrained", facecolor="white")


def tidy_axes(
    axes: Axes,
    hide: str = "top right",
    grid: Literal["both", "x", "y"] | None = "both",
    title: str | None = None,
    **ticks: Any,
) -> None:
    """Hide spines, put a faint grid behind the data, and a title on the left. ``ticks``: as for ``tick_params``."""
    if title is not None:
        axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.spines[hide.split()].set_visible(False)
    axes.tick_params(**ticks)
    if grid:
        axes.grid(axis=grid, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def log_heights(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers as labels: 10, 30, 100, 300."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def add_key(figure: FigureBase, title: str, entries: Sequence[tuple[Any, str]]) -> None:
    """The title, and below it the legend, in as few lines as fit: (artist, words).

    Several artists in a tuple are drawn side by side.
    """
    lines = max(1, -(-sum(len(words) + 5 for _, words in entries) // 105))
    key = figure.legend(
        [artist for artist, _ in entries],
        [words for _, words in entries],
        title=title,
        title_fontsize=9.5,
        alignment="left",
        loc="outside upper left",
        ncols=max(1, -(-len(entries) // lines)),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        handlelength=1.3,
        handleheight=0.7,
        handletextpad=0.45,
        columnspacing=1.3,
        labelspacing=0.3,
        borderpad=0.1,
        borderaxespad=0.2,
    )
    key.get_title().set_color(INK)
