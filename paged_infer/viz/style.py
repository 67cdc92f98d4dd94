"""One visual language for every figure: a colour for each rung, light background, readable at half size."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

RUNG_COLOURS = {
    "naive": "#b0b7c3",
    "cached": "#e0a458",
    "static": "#c1666b",
    "paged": "#2f6f9f",
    "transformers": "#8d8fb0",
    "transformers static": "#b9a6c9",
}
INK, FAINT = "#22303c", "#d9dee5"
DPI = 100


class Picture(Figure):
    """A figure that belongs to no window: alike in scripts, servers and notebooks, where it shows itself as a PNG."""

    def save(self, path: Path) -> None:
        """Write a PNG, making its folder if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._repr_png_())

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue()


def new_picture(width_in: float = 7.0, height_in: float = 3.0) -> Picture:
    """An empty picture of that size in inches, at 100 dots an inch."""
    return Picture(figsize=(width_in, height_in), dpi=DPI, layout="constrained", facecolor="white")
