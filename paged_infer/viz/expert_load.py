"""The load of a mixture's experts: how many tokens of a trace each expert of each layer computed."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import MaxNLocator

from paged_infer.control.trace import Trace
from paged_infer.viz.style import INK, Picture, new_picture


def expert_load_figure(trace: Trace) -> Picture:
    """A row for each layer with experts, a column for each expert. The colour is its load relative to an even one.

    White is 1: if T tokens choose k of E experts each, an even load is k T / E.

    Raises:
        ValueError: the trace has no loads: its model has no experts, or no step has ended.
    """
    load = np.array(trace.expert_load, dtype=float)  # [layers, E]
    if not load.size or not load.any():
        raise ValueError("the trace counts no tokens of experts: the model has none, or no step has ended")
    relative = load / load.mean(1, keepdims=True)
    picture = new_picture(7.4, 1.3 + 0.22 * max(3, min(len(load), 24)))
    axes = picture.subplots()
    scale = TwoSlopeNorm(vmin=0, vcenter=1, vmax=max(2.0, float(relative.max())))
    image = axes.imshow(relative, cmap="PuOr_r", norm=scale, aspect="auto")
    axes.set_title("tokens of each expert, in multiples of an even load", fontsize=9, color=INK, loc="left")
    axes.set_xlabel("expert", fontsize=8.5, color=INK)
    axes.set_ylabel("layer with experts", fontsize=8.5, color=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    axes.spines[:].set_visible(False)
    bar = picture.colorbar(image, ax=axes, spacing="proportional")
    bar.ax.tick_params(labelsize=8, labelcolor=INK)
    bar.outline.set_visible(False)
    return picture
