"""The charts of the chapters, so that a cell needs a line or two for its picture.

Every function returns a ``Picture``, which a notebook shows when it is a cell's last value. ``Chart`` describes one
panel of curves or bars; ``draw(chart, chart, ...)`` sets panels side by side. A subject has a file: ``charts``,
``bits``, ``machine``, ``ranks``, ``squares`` and ``steps``; chapters import from here.

Importing it gives every axes of the notebook the style of the package's own pictures (``viz.style.tidy_axes``).
"""

import matplotlib

from paged_infer.viz.style import FAINT, INK

from .bits import magnitudes, number_lines, packed_words
from .charts import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    RED,
    RUNG_COLOURS,
    Bars,
    Chart,
    Values,
    before_and_after,
    dots_and_line,
    draw,
    grouped_bars,
    labelled_bars,
    layered_bars,
    rung_bars,
    stacked_bars,
    word_bars,
)
from .machine import floors_picture, memory_shares, roofline_picture
from .ranks import link_curves
from .squares import MovingTiles, cosines, masks, programs, tables, tiles_and_bars, two_colours
from .steps import Span, compared_timelines, computed_by_step, event_marks, spans, times_by_token

matplotlib.rcParams.update(
    {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "axes.titlecolor": INK,
        "axes.labelcolor": INK,
        "axes.labelsize": 9,
        "axes.edgecolor": INK,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.8,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 9,
        "legend.labelcolor": INK,
    }
)

__all__ = [
    "BLUE",
    "COLOURS",
    "GREY",
    "ORANGE",
    "RED",
    "RUNG_COLOURS",
    "Bars",
    "Chart",
    "MovingTiles",
    "Span",
    "Values",
    "before_and_after",
    "compared_timelines",
    "computed_by_step",
    "cosines",
    "dots_and_line",
    "draw",
    "event_marks",
    "floors_picture",
    "grouped_bars",
    "labelled_bars",
    "layered_bars",
    "link_curves",
    "magnitudes",
    "masks",
    "memory_shares",
    "number_lines",
    "packed_words",
    "programs",
    "roofline_picture",
    "rung_bars",
    "spans",
    "stacked_bars",
    "tables",
    "tiles_and_bars",
    "times_by_token",
    "two_colours",
    "word_bars",
]
