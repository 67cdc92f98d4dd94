"""What happens step by step: events, timelines, and the work and time of each token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as ReadOnlyList
from typing import Any

from matplotlib.ticker import LogLocator

from paged_infer.control.trace import Trace
from paged_infer.viz.sequence_lives import sequence_lives
from paged_infer.viz.style import BASELINE_COLOURS, INK, Picture, new_picture
from paged_infer.viz.timeline import draw_timeline, timeline_height_in

from .charts import BLUE, COLOURS, GREY, ORANGE, Values


def event_marks(rows: Mapping[Any, Values], title: str, xlabel: str, ylabel: str) -> Picture:
    """When events happened: a row for each name, with a mark at each of its moments."""
    picture = new_picture(7, 2.8 if len(rows) > 8 else 1.2 + 0.3 * len(rows))
    axes = picture.subplots()
    for row, moments in enumerate(rows.values()):
        axes.plot(moments, [row] * len(moments), "|", color=BLUE, markersize=5)
    if len(rows) <= 8:
        axes.set_yticks(range(len(rows)), rows)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(len(rows) - 0.4, -0.6))
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
    labels = {"xlabel": f"new tokens after a prompt of {prompt_len}", "ylabel": "rows or pairs"}
    growth.set(xscale="log", yscale="log", title="work of a layer, all steps", **labels)
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
