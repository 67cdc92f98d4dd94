"""Curves, bars and dots: the charts that most chapters use."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from paged_infer.viz.style import BASELINE_COLOURS, INK, Picture, new_picture

BLUE, ORANGE, RED, GREY = (BASELINE_COLOURS[name] for name in ("paged", "cached", "static", "naive"))
COLOURS = (BLUE, ORANGE, RED, GREY)
RUNG_COLOURS = {**BASELINE_COLOURS, "my_engine": "#6f9f8f"}
Values = ReadOnlyList[float] | torch.Tensor


@dataclass
class Chart:
    """One panel: named curves over ``x``, or bars where ``bars`` is true.

    Attributes:
        title: what is shown, in words that stand alone.
        x: numbers, or names, which are then set as labels below the axis.
        curves: values by name; a name that begins with "_" has no entry in the legend.
        styles: format strings of matplotlib by name ("o-" by default), "--" for example.
        colours: colours by name; by default blue, orange, red, grey in this order.
        axes: what ``Axes.set`` takes: xlabel, ylabel, xscale, ylim ...
    """

    title: str
    x: Values | ReadOnlyList[str]
    curves: Mapping[str, Values]
    bars: bool = False
    styles: Mapping[str, str] = field(default_factory=dict)
    colours: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, Any] = field(default_factory=dict)

    def draw_on(self, axes: Axes) -> None:
        named = isinstance(self.x[0], str)
        places = range(len(self.x)) if named else self.x
        for (name, values), colour, covers in zip(self.curves.items(), COLOURS * 3, self._num_covers(), strict=False):
            style, colour = self.styles.get(name, "o-"), self.colours.get(name, colour)
            if self.bars:
                axes.bar(places, values, color=colour, label=name)
            else:  # wider where later curves lie on it, which would hide it
                width, size = 1.5 + 2.5 * covers, 4 + 3 * covers
                axes.plot(places, values, style, color=colour, label=name, markersize=size, linewidth=width)
        axes.grid(axis="y" if self.bars else "both")
        if named:
            axes.set_xticks(places, self.x)
        if self.axes.get("ylim") == (0, None):  # else the margin above is that of the data's own range
            axes.update_datalim([(axes.dataLim.x0, 0)])
            axes.autoscale_view()
        axes.set(title=self.title, **self.axes)
        plain_ticks(axes)

    def _num_covers(self) -> list[int]:
        """For each curve, how many of those drawn after it lie on it everywhere."""
        curves = [torch.as_tensor(values, dtype=torch.float64) for values in self.curves.values()]
        near = 0.01 * (max(map(torch.max, curves)) - min(map(torch.min, curves)))
        alike = [[a.shape == b.shape and bool(((a - b).abs() <= near).all()) for b in curves] for a in curves]
        return [sum(row[place + 1 :]) for place, row in enumerate(alike)]


@dataclass
class Bars:
    """One panel for ``draw``: for each name of ``x`` a bar of each curve, side by side, with its value.

    Attributes:
        title, curves, axes: as of ``Chart``.
        x: names, set as labels below the axis.
        line: the height of a dotted line behind the bars, 1 where ratios are shown. None: there is none.
        form: of the values.
    """

    title: str
    x: ReadOnlyList[str]
    curves: Mapping[str, Values]
    line: float | None = None
    form: str = "%.2f"
    axes: Mapping[str, Any] = field(default_factory=dict)

    def draw_on(self, axes: Axes) -> None:
        width, free = 0.84 / len(self.curves), {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
        if self.line is not None:
            axes.axhline(self.line, color=INK, linewidth=0.8, linestyle=":", zorder=0)
        for number, ((name, values), colour) in enumerate(zip(self.curves.items(), COLOURS, strict=False)):
            places = [x + (number - (len(self.curves) - 1) / 2) * width for x in range(len(self.x))]
            bars = axes.bar(places, values, 0.95 * width, color=colour, label=name)
            axes.bar_label(bars, fmt=self.form, fontsize=7, padding=2, bbox=free)  # over the line, which it hides
        axes.set_xticks(range(len(self.x)), self.x)
        axes.grid(axis="y")
        highest = max(height for heights in self.curves.values() for height in heights)
        axes.set(title=self.title, ylim=(0, highest * (1.1 + 0.16 * len(self.curves))))  # room for the legend
        axes.set(**self.axes)


def plain_ticks(axes: Axes) -> None:
    """Plain numbers along a logarithmic y axis of few decades, which has powers of ten else."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log" and high / low < 1000:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 5 else range(1, 10)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def draw(*charts: Chart | Bars, height: float = 2.8) -> Picture:
    """The panels side by side; with one legend below them if all have the same curves, else one in each."""
    picture = new_picture(7, height)
    panels = picture.subplots(1, len(charts), squeeze=False)[0]
    for axes, chart in zip(panels, charts, strict=True):
        chart.draw_on(axes)
    if len(charts) > 1 and all([*chart.curves] == [*charts[0].curves] for chart in charts):
        handles, names = panels[0].get_legend_handles_labels()
        picture.legend(handles, names, frameon=False, loc="outside lower center", ncols=len(names))
    else:
        for axes in panels:
            if len(axes.get_legend_handles_labels()[1]) > 1:
                axes.legend(frameon=False)
    return picture


def stacked_bars(
    rows: Mapping[str, Mapping[str, float]],
    title: str,
    xlabel: str,
    height: float = 2.4,
    marks: Mapping[str, Values] | None = None,
) -> Picture:
    """A horizontal bar for each row, made of its parts; all rows have the same parts, named in a legend below.

    ``marks`` are upright strokes by name, one value for each row.
    """
    picture = new_picture(7, height)
    axes = picture.subplots()
    left = [0.0] * len(rows)
    for part, colour in zip(next(iter(rows.values())), (ORANGE, GREY, RED, BLUE), strict=False):
        widths = [parts[part] for parts in rows.values()]
        axes.barh(list(rows), widths, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for name, values in (marks or {}).items():
        looks = {"markersize": 16, "markeredgewidth": 2, "linestyle": ""}
        axes.plot(values, list(rows), "|", color=INK, label=name, **looks)
    axes.invert_yaxis()
    most = max([*left, *(value for values in (marks or {}).values() for value in values)])
    axes.set(title=title, xlabel=xlabel, xlim=(0, 1.05 * float(most)))
    picture.legend(frameon=False, loc="outside lower center", ncols=4)
    return picture


def labelled_bars(
    values: Mapping[str, float],
    title: str,
    xlabel: str,
    *,
    form: str = "%g",
    compared: bool = True,
    height: float = 2.4,
) -> Picture:
    """A horizontal bar for each name, with its value; the first is grey if others are ``compared`` with it."""
    picture = new_picture(7, height)
    axes = picture.subplots()
    colours = [GREY if compared else BLUE] + [BLUE] * (len(values) - 1)
    bars = axes.barh(list(values), list(values.values()), color=colours)
    axes.bar_label(bars, fmt=" " + form)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title=title, xlabel=xlabel)
    return picture


def grouped_bars(names: ReadOnlyList[str], groups: Mapping[str, Values], title: str, ylabel: str) -> Picture:
    """For each name a bar of each group, side by side, with its value."""
    picture = new_picture(7, 2.6)
    axes = picture.subplots()
    width = 0.8 / len(groups)
    for number, ((group, values), colour) in enumerate(zip(groups.items(), (GREY, RED, BLUE, ORANGE), strict=False)):
        offset = (number - (len(groups) - 1) / 2) * width
        bars = axes.bar([x + offset for x in range(len(names))], values, width, color=colour, label=group)
        axes.bar_label(bars, fmt="%.0f", fontsize=9)
    axes.set_xticks(range(len(names)), names)
    axes.margins(y=0.3)
    axes.set(title=title, ylabel=ylabel)
    axes.legend(frameon=False, loc="upper center", ncols=len(groups))
    return picture


def layered_bars(layers: Mapping[str, Values], title: str, xlabel: str, ylabel: str) -> Picture:
    """Horizontal bars, each layer in front of the one before; the layers are named in a legend."""
    picture = new_picture(7, 2.6)
    axes = picture.subplots()
    for (name, values), colour in zip(layers.items(), (GREY, ORANGE, BLUE), strict=False):
        axes.barh(range(len(values)), values, color=colour, label=name)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, yticks=range(0, len(values), 2))
    picture.legend(frameon=False, loc="outside right")
    return picture


def word_bars(
    words: ReadOnlyList[str], values: Values, title: str, ylabel: str, marked: int, top: float = 1
) -> Picture:
    """A bar up to ``top`` for each of the first words, all words below the axis; the marked one in orange."""
    picture = new_picture(7, 2.8)
    axes = picture.subplots()
    axes.bar(range(len(values)), values, color=[ORANGE if i == marked else BLUE for i in range(len(values))])
    ticks = axes.set_xticks(range(len(words)), words, rotation=60, ha="right")
    ticks[marked].label1.set(color=ORANGE, fontweight="bold")
    axes.set(title=title, ylabel=ylabel, ylim=(0, top), xlim=(-0.6, len(words) - 0.4))
    return picture


def before_and_after(names: ReadOnlyList[str], pairs: Mapping[str, Values], title: str) -> Picture:
    """For each name two bars side by side, probabilities before in grey and after in blue; the names stand upright."""
    picture = new_picture(7, 3)
    axes = picture.subplots()
    for (label, values), offset, colour in zip(pairs.items(), (-0.2, 0.2), (GREY, BLUE), strict=True):
        axes.bar([x + offset for x in range(len(names))], values, 0.4, color=colour, label=label)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set(title=title, ylabel="probability", ylim=(0, 1))
    axes.legend(frameon=False)
    return picture


def rung_bars(panels: Mapping[str, Mapping[str, float]], ylabel: str, *, form: str = "%.1f") -> Picture:
    """A panel for each title, all on one scale: a bar with its value for each rung, in the rung's colour.

    What follows a comma in a rung's name does not change its colour.
    """
    picture = new_picture(7.4, 2.6)
    for axes, (title, heights) in zip(
        picture.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        places = [name.replace(", ", ",\n").replace("_", "_\n" if len(panels) > 1 else "_") for name in heights]
        colours = [RUNG_COLOURS[name.partition(",")[0]] for name in heights]
        axes.bar_label(axes.bar(places, list(heights.values()), color=colours), fmt=form, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.margins(y=0.15)
        axes.set_title(title, fontsize=10)
    picture.axes[0].set_ylabel(ylabel)
    return picture


def dots_and_line(
    dots: Mapping[str, ReadOnlyList[tuple[float, float]]], line: ReadOnlyList[tuple[float, float]], **axes_of: Any
) -> Picture:
    """Measured (x, y) of each rung, and a line through them; both axes logarithmic. ``axes_of``: for ``Axes.set``."""
    picture = new_picture(7, 3)
    axes = picture.subplots()
    for name, each in dots.items():
        axes.scatter(*zip(*each, strict=True), s=9, alpha=0.6, color=RUNG_COLOURS[name], label=name)
    axes.plot(*zip(*line, strict=True), color=INK, linewidth=1, label="the line")
    axes.set(xscale="log", yscale="log", **axes_of)
    plain_ticks(axes)
    axes.legend(frameon=False)
    return picture
