"""The pool map: every block of the pool at one step, its owners, and how much of it is filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from paged_infer.control.blocks.snapshot import Cell
from paged_infer.control.blocks.snapshot import pool_cells as held_or_hashed
from paged_infer.control.sequence_state import SequenceState
from paged_infer.control.trace import Replay, Trace
from paged_infer.control.trace_step import Hold
from paged_infer.viz.sequence_lives import OWNER_COLOURS, check_trace, owner_colour, sequence_names
from paged_infer.viz.style import DPI, FAINT, INK, Picture, add_key, new_picture

WIDTH_IN = 7.4
GRID_IN = 6.8  # without the blocks' numbers
TALLEST_IN = 2.4
LARGEST_CELL_IN = (0.85, 0.34)
FLATNESS = 0.62  # a cell's height over its width
COLUMNS = (8, 10, 12, 16, 20, 24, 32, 40, 50, 64, 80, 100, 128, 160, 200, 256)
LEAST_CUT, CUT_TO = (256, 50)  # of larger pools, the last blocks are left out, in fifties, if they are never used
MOST_BANDS = 4  # colours in one cell
FONT_SIZES = (8.5, 7.0, 5.5)  # the largest that fits a cell
DIGIT = 0.66  # a digit's width, in font sizes
CACHED_COLOUR = "#c3cad3"
GAP = 0.05  # of a cell, on each side
HALO = [withStroke(linewidth=1.6, foreground="#ffffffb0")]  # keeps words legible over two colours


@dataclass(frozen=True, slots=True)
class Grid:
    columns: int
    rows: int
    cell_in: tuple[float, float]  # width, height

    @classmethod
    def of(cls, num_cells: int) -> Grid:
        """A grid with as few columns as keep it low."""
        for columns in COLUMNS:
            width = min(LARGEST_CELL_IN[0], GRID_IN / columns)
            grid = cls(columns, -(-num_cells // columns), (width, min(LARGEST_CELL_IN[1], FLATNESS * width)))
            if grid.height_in <= TALLEST_IN:
                break
        return grid

    @property
    def height_in(self) -> float:
        return self.rows * self.cell_in[1]


def pool_cells(trace: Trace, step: int) -> list[Cell]:
    """Every block of the pool while ``trace.steps[step]`` runs."""
    return _cells(trace, step, trace.replay(step))


def pool_map_figure(trace: Trace, step: int = -1) -> Picture:
    """Every block while ``trace.steps[step]`` runs: owners by colour, how full, shared, hashed, cached or free.

    The tokens that this step stores count as stored. Cells are in the order of physical blocks.
    """
    check_trace(trace)
    if not trace.steps:
        raise ValueError("the trace has no steps yet: nothing to draw")
    picture = new_picture(WIDTH_IN, pool_map_height_in(trace))
    draw_pool_map(picture, trace, step)
    return picture


def pool_map_height_in(trace: Trace) -> float:
    """Inches; the same for every step of a trace."""
    num_shown = _num_shown(trace)
    return Grid.of(num_shown).height_in + 0.62 + 0.18 * (num_shown < trace.num_blocks)


def draw_pool_map(figure: FigureBase, trace: Trace, step: int) -> None:
    """Fill an empty figure, or a part of one."""
    replay = trace.replay(step)
    cells = _cells(trace, step, replay)
    shown = cells[: _num_shown(trace)]
    grid = Grid.of(len(shown))
    axes = figure.subplots()
    _draw_slots(axes, shown, grid, trace.block_size)
    _draw_free(axes, shown, grid)
    _draw_signs(axes, shown, grid)
    _write_owners(axes, shown, grid, sequence_names(trace), trace.block_size)
    axes.spines[:].set_visible(False)
    axes.set_xlim(0, grid.columns)
    axes.set_ylim(max(1, grid.rows), 0)
    every = next(n for n in (1, 2, 5, 10, 20, 50) if n * grid.cell_in[1] * DPI >= 11)
    rows = range(0, grid.rows, every)
    axes.set_yticks([row + 0.5 for row in rows], [f"{row * grid.columns:,}" for row in rows])
    axes.set_xticks([])
    if len(shown) < len(cells):
        left_out = f"blocks {len(shown):,} to {len(cells) - 1:,} are never used in this trace, and not drawn"
        axes.set_xlabel(left_out, fontsize=8.5, color=INK, labelpad=2)
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    axes.set_ylabel("block", fontsize=8.5, color=INK)
    add_key(figure, _title(cells, range(len(trace.steps))[step], replay, trace.block_size), _key(trace))


def _cells(trace: Trace, step: int, replay: Replay) -> list[Cell]:
    now = trace.steps[step].scheduled
    tables = (
        (sequence_id, table, replay.computed[sequence_id] + now.get(sequence_id, 0))
        for sequence_id, table in sorted(replay.tables.items())
    )
    cells = held_or_hashed(tables, replay.pool, trace.block_size)
    return [cells.get(block) or Cell(block, (), 0, False) for block in range(trace.num_blocks)]


def _num_shown(trace: Trace) -> int:
    if trace.num_blocks <= LEAST_CUT:
        return trace.num_blocks
    holds = (event.blocks for step in trace.steps for event in step.events if isinstance(event, Hold))
    used = max((max(blocks, default=0) for blocks in holds), default=0) + 1
    return min(trace.num_blocks, max(LEAST_CUT, -(-used // CUT_TO) * CUT_TO))


def _box(
    cell: Cell, grid: Grid, left: float = 0.0, right: float = 1.0, top: float = 0.0, bottom: float = 1.0
) -> list[tuple[float, float]]:
    """Corners of a part of the cell, given as shares of its inside."""
    row, column = divmod(cell.block, grid.columns)
    inside = 1 - 2 * GAP
    x0, x1 = (column + GAP + inside * share for share in (left, right))
    y0, y1 = (row + GAP + inside * share for share in (top, bottom))
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _draw_slots(axes: Axes, cells: Sequence[Cell], grid: Grid, block_size: int) -> None:
    """A band for each owner: full colour as far as there are tokens, and a tint over the slots after them."""
    parts: dict[str, tuple[list[Any], list[str]]] = {"tokens": ([], []), "empty": ([], [])}
    for cell in cells:
        owners = cell.owners[:MOST_BANDS]
        share = cell.num_tokens / max(1, block_size)
        for band, owner in enumerate(owners):
            top, bottom = band / len(owners), (band + 1) / len(owners)
            for kind, left, right in (("tokens", 0.0, share), ("empty", share, 1.0)):
                if right > left:
                    colour = owner_colour(owner)
                    parts[kind][0].append(_box(cell, grid, left, right, top, bottom))
                    parts[kind][1].append(colour if kind == "tokens" else _tint(colour))
    for kind, (boxes, colours) in parts.items():
        _add(axes, kind, boxes, facecolors=colours, linewidths=0)


def _draw_free(axes: Axes, cells: Sequence[Cell], grid: Grid) -> None:
    by_state = {state: [_box(c, grid) for c in cells if c.state == state] for state in ("cached", "free")}
    _add(axes, "cached", by_state["cached"], facecolors=CACHED_COLOUR, linewidths=0)
    _add(axes, "free", by_state["free"], facecolors="white", edgecolors=FAINT, linewidths=0.8)


def _draw_signs(axes: Axes, cells: Sequence[Cell], grid: Grid) -> None:
    """A frame around blocks with several owners; a dark corner on held blocks that have a hash."""
    shared = [_box(cell, grid) for cell in cells if len(cell.owners) > 1]
    _add(axes, "shared", shared, facecolors="none", edgecolors=INK, linewidths=1.1)
    width, height = grid.cell_in
    size = min(0.09, 0.3 * height)  # inches
    corners = []
    for cell in cells:
        if cell.owners and cell.is_hashed:
            x1, y0 = _box(cell, grid)[1]
            corners.append([(x1 - size / width, y0), (x1, y0), (x1, y0 + size / height)])
    _add(axes, "findable", corners, facecolors=INK, linewidths=0)


def _add(axes: Axes, name: str, boxes: Sequence[Any], **style: Any) -> None:
    if boxes:
        collection = PolyCollection(boxes, **style)
        collection.set_label(name)
        axes.add_collection(collection, autolim=False)


def _write_owners(axes: Axes, cells: Sequence[Cell], grid: Grid, names: Mapping[int, str], block_size: int) -> None:
    """Write each block's owner, or the number of owners, as large as fits; in large cells also the filled slots."""
    width, height = (inches * 72 for inches in grid.cell_in)  # points
    for cell in cells:
        num_owners = len(cell.owners)
        if not num_owners:
            continue
        (left, high), _, (right, low), _ = _box(cell, grid)
        middle = (high + low) / 2
        if num_owners == 1:
            partly = f"   {cell.num_tokens}/{block_size}" * (cell.num_tokens < block_size and width > 45)
            _write(axes, (left + right) / 2, middle, names[cell.owners[0]] + partly, width, height)
            continue
        aside = width > 45 and height >= FONT_SIZES[1] * num_owners  # each band has room for its owner's name
        _write(axes, left + (0.75 if aside else 0.5) * (right - left), middle, f"×{num_owners}", width, height)
        for band, owner in enumerate(cell.owners if aside else ()):
            y = high + (band + 0.5) / num_owners * (low - high)
            _write(axes, left + 0.3 * (right - left), y, names[owner], width / 2, height / num_owners)


def _write(axes: Axes, x: float, y: float, text: str, width: float, height: float) -> None:
    """Write text as large as fits in this many points, or not at all."""
    size = next((s for s in FONT_SIZES if DIGIT * s * len(text) <= 0.86 * width and s <= 0.95 * height), None)
    if size is not None:
        halo = HALO if "×" in text else None
        axes.text(x, y, text, ha="center", va="center_baseline", fontsize=size, color=INK, path_effects=halo)


def _title(cells: Sequence[Cell], place: int, replay: Replay, block_size: int) -> str:
    held = [cell for cell in cells if cell.owners]
    num_owners = len({owner for cell in held for owner in cell.owners})
    title = f"step {place}: {len(held):,} of {len(cells):,} blocks held by {num_owners} "
    title += "sequence" if num_owners == 1 else "sequences"
    if held:
        share = sum(cell.num_tokens for cell in held) / (len(held) * block_size)
        title += f", {share:.0%} of their slots filled"
    num_shared, num_cached = sum(len(c.owners) > 1 for c in held), sum(c.state == "cached" for c in cells)
    title += f", {num_shared:,} shared" * bool(num_shared) + f", {num_cached:,} cached" * bool(num_cached)
    num_swapped = sum(state is SequenceState.SWAPPED for state in replay.states.values())
    return title + f"; {num_swapped} swapped out" * bool(num_swapped)


def _key(trace: Trace) -> list[tuple[Any, str]]:
    """The legend: the same for every step, so that the map does not move from one step to the next."""
    colour = OWNER_COLOURS[0]
    key: list[tuple[Any, str]] = [((Patch(facecolor=colour), Patch(facecolor=_tint(colour))), "tokens, empty slots")]
    if any(step.num_shared_blocks for step in trace.steps):
        key.append((Patch(facecolor="white", edgecolor=INK), "held by several"))
    if any(step.num_cached_blocks for step in trace.steps):
        corner = Line2D([], [], marker="$\u25e5$", color=INK, linestyle="", markersize=6, markeredgewidth=0)
        key.append((corner, "findable"))
        key.append((Patch(facecolor=CACHED_COLOUR), "free, findable"))
    key.append((Patch(facecolor="white", edgecolor=FAINT), "free"))
    return key


def _tint(colour: str) -> str:
    """A pale version of the colour."""
    red, green, blue = (0.72 + 0.28 * part for part in to_rgb(colour))
    return to_hex((red, green, blue))
