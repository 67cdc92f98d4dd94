"""Tables, masks and tiles: pictures made of squares."""

from __future__ import annotations

import io
from collections.abc import Mapping
from collections.abc import Sequence as ReadOnlyList

import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from paged_infer.viz.style import FAINT, INK, Picture, new_picture

from .charts import BLUE, COLOURS, GREY, ORANGE, RED


def masks(named: Mapping[str, torch.Tensor]) -> Picture:
    """Masks side by side, each bool [queries, keys]: dark where a query may see a key."""
    picture = new_picture(7, 2.2)
    panels = picture.subplots(1, len(named))
    for axes, (name, seen) in zip(panels, named.items(), strict=True):
        axes.imshow(seen.cpu(), cmap="Blues", vmin=0, vmax=1.4)
        axes.set_title(name, fontsize=9)
        axes.set(xticks=range(seen.shape[1]), yticks=range(seen.shape[0]), xlabel="key")
    panels[0].set_ylabel("query")
    return picture


def tables(named: Mapping[str, torch.Tensor], xlabel: str, ylabel: str, height: float = 3.2) -> Picture:
    """Tables of numbers between 0 and 1 side by side, each number on a square of its shade."""
    picture = new_picture(7, height)
    for axes, (name, values) in zip(picture.subplots(1, len(named)), named.items(), strict=True):
        axes.imshow(values.cpu(), cmap="Blues", vmin=0, vmax=1)
        for row, column in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
            value = values[row, column].item()
            shade = "white" if value > 0.6 else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)
        axes.set_title(name, fontsize=10)
        axes.set(xlabel=xlabel, ylabel=ylabel, xticks=range(values.shape[1]), yticks=range(values.shape[0]))
    return picture


def two_colours(rows: ReadOnlyList[ReadOnlyList[bool]], title: str, names: tuple[str, str], xlabel: str) -> Picture:
    """A square for each value of each row: dark where it is false, pale where it is true, as ``names`` explains."""
    picture = new_picture(7, 2.6)
    axes = picture.subplots()
    axes.pcolormesh([list(map(int, row)) for row in rows], cmap=ListedColormap([BLUE, FAINT]), vmin=0, vmax=1,
                    edgecolors="white", linewidth=3)  # fmt: skip
    axes.set(title=title, xlabel=xlabel, ylabel="request")
    axes.set_xticks([i + 0.5 for i in range(len(rows[0]))], range(len(rows[0])))
    axes.set_yticks([i + 0.5 for i in range(len(rows))], range(len(rows)))
    axes.invert_yaxis()
    patches = [Patch(color=colour, label=name) for colour, name in zip((BLUE, FAINT), names, strict=True)]
    picture.legend(handles=patches, frameon=False, loc="outside right")
    return picture


def programs(named: Mapping[str, torch.Tensor], height: float = 2.2) -> Picture:
    """Which program touches what: tables of whole numbers side by side, a colour for each number, -1 left white."""
    picture = new_picture(7, height)
    widths = [max(values.shape[1], 3) for values in named.values()]
    panels = picture.subplots(1, len(named), squeeze=False, width_ratios=widths)[0]
    for axes, (name, values) in zip(panels, named.items(), strict=True):
        axes.set_aspect("equal")
        for row, column in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
            number = int(values[row, column])
            colour = "white" if number < 0 else COLOURS[number % 4]
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, alpha=0.55, edgecolor="white"))
            if number >= 0 and values.numel() <= 160:
                axes.text(column + 0.5, row + 0.55, str(number), ha="center", va="center", fontsize=8, color=INK)
        axes.set(xlim=(0, values.shape[1]), ylim=(values.shape[0], 0), xticks=[], yticks=[])
        axes.set_title(name, fontsize=9)
    return picture


def cosines(names: ReadOnlyList[str], values: torch.Tensor, title: str) -> Picture:
    """A square of shades, [names, names], each name beside its row and below its column."""
    picture = new_picture(5.2, 4.2)
    axes = picture.subplots()
    image = axes.imshow(values.cpu(), cmap="Blues", vmin=0, vmax=0.7)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(title)
    picture.colorbar(image, ax=axes)
    return picture


def tiles_and_bars(
    tokens: int, block_q: int, block_k: int, causal: bool, counts: Mapping[str, float], title: str
) -> Picture:
    """Left, the tiles of an attention: blue, orange where a causal mask cuts them, white where none is made. Right, a
    bar for each count.
    """
    first, begin = torch.arange(0, tokens, block_q)[:, None], torch.arange(0, tokens, block_k)[None]
    kind = 1 + 0 * (first + begin)
    if causal:
        kind = torch.where(begin + block_k - 1 <= first, 1, torch.where(begin <= first + block_q - 1, 2, 0))
    picture = new_picture(7.4, 3)
    tiles, bars = picture.subplots(1, 2, width_ratios=[1, 1.5])
    colours, width = ListedColormap(["white", BLUE, ORANGE]), 0.5 if kind.shape[0] < 60 else 0
    tiles.pcolormesh(kind, cmap=colours, vmin=0, vmax=2, edgecolors="white", linewidth=width)
    tiles.invert_yaxis()
    tiles.set(title=f"tiles of {block_q} × {block_k}", xlabel="blocks of keys", ylabel="blocks of queries")
    tiles.set(xticks=[], yticks=[])
    drawn = bars.barh(list(counts), list(counts.values()), color=[RED, ORANGE, GREY, BLUE, GREY])
    bars.bar_label(drawn, fmt=" {:,.1f}", fontsize=9)
    bars.invert_yaxis()
    bars.set(title=title, xscale="log", xlim=(min(counts.values()) / 2, 8 * max(counts.values())))
    return picture


class MovingTiles:
    """Causal attention in square tiles, a frame for each tile and for each block of the output that is stored.

    Blue is what is in SRAM, orange a tile on the diagonal, pale what was there. It counts what moves to and from HBM.
    """

    def __init__(self, num_blocks: int, block: int, dim: int) -> None:
        self.num_moved, self._done, pictures = 0, set[tuple[int, int]](), []
        for i in range(num_blocks):
            self.num_moved += block * dim  # of q
            for j in range(i + 1):
                self.num_moved += 2 * block * dim  # of k and of v
                pictures.append(self._frame(num_blocks, i, j))
                self._done.add((i, j))
            diagonal = len(pictures) - 1  # a frame with all colours
            self.num_moved += block * dim
            pictures.append(self._frame(num_blocks, i, None))
        self.num_frames, self.num_tiles = len(pictures), len(self._done)
        pixels = [Image.open(io.BytesIO(picture.png(1))).convert("RGB") for picture in pictures]
        # One palette for all, so that a frame stores only what has changed.
        few_colours = pixels[diagonal].quantize(16, Image.Quantize.MAXCOVERAGE)
        first, *rest = (image.quantize(palette=few_colours, dither=Image.Dither.NONE) for image in pixels)
        gif = io.BytesIO()
        durations = [500] * len(rest) + [2000]
        first.save(gif, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
        self._gif, self._size_px = gif.getvalue(), pictures[0].size_px

    def __repr__(self) -> str:
        return f"{self.num_frames} frames"

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return self._gif, self._size_px  # GitHub shows no "gif"; a browser looks at the bytes and plays it

    def _frame(self, num_blocks: int, queries: int, keys: int | None) -> Picture:
        picture = new_picture(4.8, 3.4)
        axes = picture.subplots()

        def box(x: float, y: float, colour: str, text: str = "") -> None:
            axes.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, facecolor=colour, edgecolor=GREY))
            ink = "white" if colour == BLUE else INK
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9, color=ink)

        for i in range(num_blocks):
            box(-1.5, i, BLUE if i == queries else "white", f"q{i}")
            box(i, -1.5, BLUE if i == keys else "white", f"k{i} v{i}")
            box(num_blocks + 0.5, i, BLUE if i == queries else "#c9dbe8" if i < queries else "white", f"o{i}")
            for j in range(i + 1):
                now, pale = (i, j) == (queries, keys), (i, j) in self._done
                box(j, i, (ORANGE if i == j else BLUE) if now else "#e6edf3" if pale else "white")
        masked = ", masked" if queries == keys else ""
        what = f"o{queries} is stored" if keys is None else f"q{queries} meets k{keys}{masked}"
        end = num_blocks + 1.7
        axes.set(xlim=(-1.7, end), ylim=(num_blocks + 0.2, -1.7), title=f"{what}: {self.num_moved} numbers moved")
        axes.axis("off")
        return picture
