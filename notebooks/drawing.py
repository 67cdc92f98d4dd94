"""The charts of the chapters, so that a cell needs a line or two for its picture.

Every function returns a ``Picture``, which a notebook shows when it is a cell's last value. ``Chart`` describes one
panel of curves or bars; ``draw(chart, chart, ...)`` sets panels side by side.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator
from PIL import Image

from paged_infer.bench.roofline import Roofline
from paged_infer.bench.scheduling.memory_figure import PART_COLOURS, PART_NAMES
from paged_infer.control.trace import Trace
from paged_infer.viz.sequence_lives import sequence_lives
from paged_infer.viz.style import BASELINE_COLOURS, FAINT, INK, Picture, new_picture
from paged_infer.viz.timeline import draw_timeline, timeline_height_in

BLUE, ORANGE, RED, GREY = (BASELINE_COLOURS[name] for name in ("paged", "cached", "static", "naive"))
COLOURS = (BLUE, ORANGE, RED, GREY)
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
        for (name, values), colour in zip(self.curves.items(), COLOURS * 3, strict=False):
            style, colour = self.styles.get(name, "o-"), self.colours.get(name, colour)
            if self.bars:
                axes.bar(places, values, color=colour, label=name)
            else:
                axes.plot(places, values, style, color=colour, label=name, markersize=4)
        if named:
            axes.set_xticks(places, self.x)
        axes.set(title=self.title, **self.axes)


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
        axes.margins(y=0.15)
        axes.set(title=self.title, **self.axes)


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
    axes.set(title=title, xlabel=xlabel)
    picture.legend(frameon=False, loc="outside lower center", ncols=4)
    return picture


def event_marks(rows: Mapping[Any, Values], title: str, xlabel: str, ylabel: str) -> Picture:
    """When events happened: a row for each name, with a mark at each of its moments."""
    picture = new_picture(7, 2.8 if len(rows) > 8 else 1.2 + 0.3 * len(rows))
    axes = picture.subplots()
    for row, moments in enumerate(rows.values()):
        axes.plot(moments, [row] * len(moments), "|", color=BLUE, markersize=5)
    if len(rows) <= 8:
        axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return picture


def compared_timelines(traces: Mapping[str, Trace]) -> Picture:
    """The package's timelines one below the other, over time, with the same scales: a moment stands below itself."""
    lives = [sequence_lives(trace) for trace in traces.values()]
    heights = [timeline_height_in(len(rows)) for rows in lives]
    picture = new_picture(7.4, sum(heights))
    parts = picture.subfigures(len(traces), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (name, trace), rows in zip(parts, traces.items(), lives, strict=True):
        draw_timeline(part, trace, rows, by="time")
        part.text(0.99, 0.985, name, ha="right", va="top", weight="bold", color=INK)
    last_s = max(part.axes[0].get_xlim()[1] for part in parts)
    most, ticks = max((part.axes[1].get_ylim()[1], [*part.axes[1].get_yticks()]) for part in parts)
    for part in parts:
        part.axes[0].set_xlim(right=last_s)  # which the axes of tokens share
        part.axes[1].set_ylim(top=most)
        part.axes[1].set_yticks(ticks)  # numbers beside the axes are equally wide, and so are the margins
    return picture


def labelled_bars(
    values: Mapping[str, float], title: str, xlabel: str, *, form: str = "%g", compared: bool = True
) -> Picture:
    """A horizontal bar for each name, with its value; the first is grey if others are ``compared`` with it."""
    picture = new_picture(7, 2.4)
    axes = picture.subplots()
    colours = [GREY if compared else BLUE] + [BLUE] * (len(values) - 1)
    bars = axes.barh(list(values), list(values.values()), color=colours)
    axes.bar_label(bars, fmt=" " + form)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title=title, xlabel=xlabel)
    return picture


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


def word_bars(words: ReadOnlyList[str], values: Values, title: str, ylabel: str, marked: int) -> Picture:
    """A bar for each of the first words, all words below the axis; the marked one in orange."""
    picture = new_picture(7, 2.8)
    axes = picture.subplots()
    axes.bar(range(len(values)), values, color=[ORANGE if i == marked else BLUE for i in range(len(values))])
    ticks = axes.set_xticks(range(len(words)), words, rotation=60, ha="right")
    ticks[marked].label1.set(color=ORANGE, fontweight="bold")
    axes.set(title=title, ylabel=ylabel, ylim=(0, 1), xlim=(-0.6, len(words) - 0.4))
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


def memory_shares(rows: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]], title: str) -> Picture:
    """Shares of a memory, each row measured (above) and as the paper has it (below, paler): ``PART_NAMES``."""
    picture = new_picture(7, 3.2)
    axes = picture.subplots()
    for number, both in enumerate(rows.values()):
        for shares, place, height, alpha, note in zip(
            both, (number, number + 0.34), (0.42, 0.2), (1, 0.55), ("", " in the paper"), strict=True
        ):
            left = 0.0
            for part, colour in PART_COLOURS.items():
                axes.barh(place, 100 * shares[part], height, left, color=colour, alpha=alpha)
                left += 100 * shares[part]
            axes.text(102, place, f"{shares['tokens']:.1%}{note}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlim=(0, 130), ylim=(len(rows) - 0.3, -0.5), xlabel=title, xticks=range(0, 101, 20))
    patches = [Patch(color=PART_COLOURS[part], label=name) for part, name in PART_NAMES.items()]
    picture.legend(handles=patches, frameon=False, loc="outside upper center", ncols=4, fontsize=8)
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


def computed_by_step(
    prompt_len: int, length: int, work: Callable[[int, int], ReadOnlyList[float]], outputs: ReadOnlyList[int]
) -> Picture:
    """The tokens that each step computes, naive and cached, and how rows and pairs grow with the new tokens.

    Args:
        work: prompt and new tokens -> rows and pairs naive, rows and pairs cached.
        outputs: the numbers of new tokens at the right.
    """
    picture = new_picture(7, 3)
    steps, growth = picture.subplots(1, 2)
    lengths = range(prompt_len, length)
    steps.fill_betweenx(lengths, 0, lengths, color=GREY, label="naive")
    steps.plot([0, prompt_len, length], [prompt_len, prompt_len, length], color=ORANGE, linewidth=4, label="cached")
    labels = {"xlabel": "token of the text", "ylabel": "length of the text at this step"}
    steps.set(title="tokens that a step computes", xlim=(0, length), ylim=(length, prompt_len - 2), **labels)
    names = {"rows, naive": (GREY, "-"), "pairs, naive": (GREY, ":"), "rows, cached": (ORANGE, "-")}
    names["pairs, cached"] = ORANGE, ":"
    for column, (name, (colour, line)) in enumerate(names.items()):
        growth.plot(outputs, [work(prompt_len, n)[column] for n in outputs], line, color=colour, label=name)
    growth.set(xscale="log", yscale="log", xlabel=f"new tokens after a prompt of {prompt_len}", title="work in a layer")
    steps.legend(frameon=False, loc="upper right")
    growth.legend(frameon=False)
    return picture


def times_by_token(measured: Mapping[int, Mapping[str, Values]]) -> Picture:
    """Milliseconds of each new token, a panel for each prompt length and a curve for each baseline."""
    picture = new_picture(7, 2.9)
    panels = picture.subplots(1, len(measured), sharey=True)
    for axes, (prompt_len, times) in zip(panels, measured.items(), strict=True):
        for name, values in times.items():
            axes.plot(range(1, len(values) + 1), values, color=BASELINE_COLOURS[name], label=name)
        axes.set(title=f"after a prompt of {prompt_len}", xlabel="new token", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    panels[0].set_ylabel("milliseconds")
    picture.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    return picture


def roofline_picture(roof: Roofline, steps: Mapping[str, ReadOnlyList[tuple[float, float]]]) -> Picture:
    """Steps below the roof: of each (operations a byte, GFLOP/s), on logarithmic axes."""
    picture = new_picture(7, 3.4)
    axes = picture.subplots()
    dots = [dot for found in steps.values() for dot in found]
    ends = [0.8 * min(x for x, _ in dots), 2 * max(*(x for x, _ in dots), roof.ridge_flops_per_byte)]
    corners = [ends[0], roof.ridge_flops_per_byte, ends[1]]
    heights = [min(roof.matmul_flops_per_s, x * roof.bandwidth_bytes_per_s) / 1e9 for x in corners]
    axes.plot(corners, heights, color=INK, label="roof: bandwidth, then peak")
    for (name, found), colour in zip(steps.items(), (ORANGE, BLUE, RED), strict=True):
        axes.plot(*zip(*found, strict=True), "o-", color=colour, label=name, linewidth=1, markersize=4)
    labels = {"xlabel": "arithmetic intensity, operations a byte", "ylabel": "GFLOP/s"}
    axes.set(xscale="log", yscale="log", title="the roofline of this machine, and steps of a decoder", **labels)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower right")
    return picture


def floors_picture(
    roof: Roofline, parameters: float, weight_bytes: float, kv_token_bytes: float, context: int, batch: int
) -> Picture:
    """The least that reading and computing take, for a prefill of one prompt and a decode step of a batch."""
    per_s, flops_per_s = roof.bandwidth_bytes_per_s, roof.matmul_flops_per_s
    read_s, cache_s = weight_bytes / per_s, batch * context * kv_token_bytes / per_s
    prefill_s, decode_s = (2 * parameters * tokens / flops_per_s for tokens in (context, batch))
    picture = new_picture(7, 2.8)
    axes = picture.subplots()
    axes.barh([0, 2], [1e3 * read_s] * 2, color=BLUE, label="read weights")
    axes.barh([2], [1e3 * cache_s], left=1e3 * read_s, color=RED, label="read caches")
    axes.barh([1, 3], [1e3 * prefill_s, 1e3 * decode_s], color=ORANGE, label="compute")
    axes.set_yticks([0.5, 2.5], [f"prefill,\n{context} tokens", f"decode,\n{batch} texts"])
    axes.invert_yaxis()
    ttft_s, tpot_s = max(read_s, prefill_s), max(read_s + cache_s, decode_s)
    gb = (weight_bytes + batch * context * kv_token_bytes) / 1e9
    speed = f"TTFT {1e3 * ttft_s:.0f} ms, TPOT {1e3 * tpot_s:.1f} ms, {batch / tpot_s:,.0f} tokens/s"
    axes.set(title=f"{speed}, {gb:.0f} GB", xlabel="milliseconds at least")
    picture.legend(frameon=False, loc="outside lower center", ncols=3)
    return picture


RUNG_COLOURS = {**BASELINE_COLOURS, "my_engine": "#6f9f8f"}


def rung_bars(panels: Mapping[str, Mapping[str, float]], ylabel: str, *, form: str = "%.1f") -> Picture:
    """A panel for each title, all on one scale: a bar with its value for each rung, in the rung's colour.

    What follows a comma in a rung's name does not change its colour.
    """
    picture = new_picture(7.4, 2.6)
    for axes, (title, heights) in zip(
        picture.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        places = [name.replace(", ", ",\n").replace("_", "_\n") for name in heights]
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
    axes.legend(frameon=False)
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


Span = tuple[str, float, float]  # name, beginning, duration


def spans(lanes: Mapping[str, ReadOnlyList[Span]], title: str, xlabel: str, height: float = 2.4) -> Picture:
    """A timeline: a lane for each kind of event, a bar for each event, its name in it where there is room."""
    picture = new_picture(7, height)
    axes = picture.subplots()
    end = max(begin + duration for events in lanes.values() for _, begin, duration in events)
    for place, (events, colour) in enumerate(zip(lanes.values(), COLOURS * 3, strict=False)):
        axes.broken_barh([(begin, duration) for _, begin, duration in events], (place - 0.4, 0.8), color=colour)
        for name, begin, duration in events:
            if duration > end * 0.013 * len(name):
                axes.text(begin + duration / 2, place, name, ha="center", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(lanes)), list(lanes))
    axes.invert_yaxis()
    axes.set(title=title, xlabel=xlabel, xlim=(0, end))
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
        pixels = [Image.open(io.BytesIO(picture._repr_png_())).convert("RGB") for picture in pictures]
        # One palette for all, so that a frame stores only what has changed.
        few_colours = pixels[diagonal].quantize(16, Image.Quantize.MAXCOVERAGE)
        first, *rest = (image.quantize(palette=few_colours, dither=Image.Dither.NONE) for image in pixels)
        gif = io.BytesIO()
        durations = [500] * len(rest) + [2000]
        first.save(gif, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
        self._gif = gif.getvalue()

    def __repr__(self) -> str:
        return f"{self.num_frames} frames"

    def _repr_png_(self) -> bytes:
        return self._gif  # GitHub shows no "gif"; a browser looks at the bytes and plays it

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
