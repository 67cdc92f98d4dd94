"""The timeline: a row for each sequence, with what it did in every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from paged_infer.control.trace import Trace
from paged_infer.viz.sequence_lives import Life, Span, owner_colour, sequence_lives
from paged_infer.viz.style import DPI, FAINT, INK, Picture, add_key, new_picture

WIDTH_IN = 7.4
MARGIN_IN = 0.75  # width taken by names and numbers
DIGIT_PX = 6.0  # of a number in a bar
SMALLEST_TEXT_ROW_PX = 12.0
NARROWEST_PREFILL_PX = 2.5  # a prefill among hundreds of steps would be too thin to be seen
PREFILLS = ("prefill", "recompute")


@dataclass(frozen=True, slots=True)
class Look:
    """How a state is drawn: a full bar while computing, a thin one without blocks; colour is not the only sign."""

    words: str
    face: str
    edge: str = "none"
    height: float = 0.8  # of the row
    hatch: str = ""


LOOKS = {
    "prefill": Look("prefill", "#e0a458"),
    "recompute": Look("computed again", "#c1666b"),
    "decode": Look("decode", "#2f6f9f"),
    "stalled": Look("runs, but computes nothing", "white", edge="#2f6f9f"),
    "waiting": Look("waits", "#b4bcc7", height=0.22),
    "swapped": Look("swapped out", "#3f1a52", height=0.22),
    "held": Look("has ended, keeps its blocks", "white", edge="#9aa5b1", hatch="//////"),
    "failed": Look("the step failed", "white", edge="#c1666b", hatch="xxxxxx"),
}


def timeline_figure(trace: Trace, *, by: str = "step", cursor: int | None = None) -> Picture:
    """Which sequences prefill (and how many tokens), decode, wait or are swapped out, and the tokens of every step.

    A number in a prefill, or where decoding begins, counts the tokens that were computed, and "+n" those that were
    found in the prefix cache or stored by the sample that it was forked from. Steps are indices into ``trace.steps``.

    Args:
        by: "step" makes all steps equally wide, "time" as wide as they took.
        cursor: mark this step.
    """
    lives = sequence_lives(trace)
    picture = new_picture(WIDTH_IN, timeline_height_in(len(lives)))
    draw_timeline(picture, trace, lives, by=by, cursor=cursor)
    return picture


def timeline_height_in(num_rows: int) -> float:
    """Inches for this many sequences: more rows are smaller."""
    return 1.55 + max(3, num_rows) * _row_in(num_rows)


def draw_timeline(
    figure: FigureBase,
    trace: Trace,
    lives: Sequence[Life],
    *,
    by: str = "step",
    cursor: int | None = None,
    owners: bool = False,
) -> None:
    """Fill an empty figure, or a part of one. ``owners``: give the names the colours of the pool map."""
    edges, unit = _edges(trace, by)
    heights = (max(3, len(lives)) * _row_in(len(lives)), 0.42)
    rows, tokens = figure.subplots(2, 1, sharex=True, height_ratios=heights)
    _draw_rows(rows, lives, edges, owners)
    _draw_tokens(tokens, trace, lives, edges)
    for axes in (rows, tokens):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(INK if axes is tokens else FAINT)
        axes.tick_params(length=0, labelsize=8, labelcolor=INK)
        if cursor is not None:
            place = range(len(trace.steps))[cursor]
            axes.axvspan(edges[place], edges[place + 1], facecolor=INK, edgecolor=INK, alpha=0.3, gid="cursor")
            if axes is rows:
                at = ((edges[place] + edges[place + 1]) / 2, 1.0)
                axes.annotate(
                    f"step {place}",
                    at,
                    (0, 2),
                    ("data", "axes fraction"),
                    "offset points",
                    fontsize=8.5,
                    ha="center",
                    color=INK,
                )
    rows.set_xlim(edges[0], edges[-1])
    tokens.set_xlabel(unit, fontsize=8.5, color=INK, labelpad=1)
    if by == "step":
        tokens.xaxis.get_major_locator().set_params(integer=True)
    add_key(figure, _title(trace, lives), _key(lives))


def _title(trace: Trace, lives: Sequence[Life]) -> str:
    title = f"{_count(len(lives), 'sequence')}, {_count(len(trace.steps), 'step')}"
    if num_idle := sum(not step.sequence_ids for step in trace.steps):  # a batch waited to fill
        title += f" ({num_idle} of them idle)"
    num_preempted = sum(len(life.preempted) for life in lives)
    if num_preempted:
        title += f", {_count(num_preempted, 'preemption')}"
    num_hits, num_looked_up = trace.hits
    if num_hits:
        title += f", {num_hits:,} of {num_looked_up:,} tokens to prefill found in the cache"
    return title


def _draw_rows(axes: Axes, lives: Sequence[Life], edges: Sequence[float], owners: bool) -> None:
    px = (WIDTH_IN - MARGIN_IN) * DPI / (edges[-1] - edges[0])
    narrow = (edges[-1] - edges[0]) * px / (len(edges) - 1) < 2 * NARROWEST_PREFILL_PX
    for state, look in reversed(LOOKS.items()):  # prefills last: if they are widened, they hide what follows
        least = NARROWEST_PREFILL_PX / px if state in PREFILLS else 0.0
        bars = []
        for row, life in enumerate(lives):
            for span in life.spans:
                if span.state == state:
                    left, right = edges[span.first], edges[span.last + 1]
                    low, high = row - look.height / 2, row + look.height / 2
                    bars.append((left, low, max(right, left + least), high))
        _add_bars(axes, bars, look, state, separate=not narrow)
    marks = [(edges[place], row) for row, life in enumerate(lives) for place in life.preempted]
    if marks:
        axes.plot(*zip(*marks, strict=True), **_preemption_mark(len(lives)))
    if _row_in(len(lives)) * DPI >= SMALLEST_TEXT_ROW_PX:
        for row, life in enumerate(lives):
            _write_counts(axes, row, life.spans, edges, px)
    axes.set_ylim(max(3, len(lives)) - 0.5, -0.5)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * _row_in(len(lives)) * DPI >= 11)
    shown = range(0, len(lives), every)
    ticks = axes.set_yticks(shown, [lives[row].name for row in shown])
    axes.set_ylabel("sequence" if any("." in life.name for life in lives) else "request", fontsize=8.5, color=INK)
    if owners:
        for row, tick in zip(shown, ticks, strict=True):
            colour = owner_colour(lives[row].sequence_id)
            tick.label1.set_bbox({"facecolor": colour, "edgecolor": "none", "pad": 1.2})


def _write_counts(axes: Axes, row: int, spans: Sequence[Span], edges: Sequence[float], px: float) -> None:
    """Write each prefill's tokens in its bar; if those of a run do not fit, their sum where decoding begins."""

    def has_room(span: Span, text: str) -> bool:
        return len(text) * DIGIT_PX + 3 <= (edges[span.last + 1] - edges[span.first]) * px

    def write(x: float, text: str, align: str, colour: str) -> None:
        axes.text(x, row, text, ha=align, color=colour, fontsize=7.5, va="center_baseline", clip_on=True)

    groups = [list(group) for _, group in groupby(spans, lambda span: span.state in PREFILLS)]
    for run, following in zip(groups, [*groups[1:], []], strict=True):
        texts = [_tokens(span.num_tokens, span.num_found) for span in run]
        back = [span for span in run if span.num_found and span.state == "decode"]  # all its tokens were stored already
        label_of = {id(span): f"+{span.num_found}" for span in back}
        if run[0].state in PREFILLS:
            label_of.clear()
            if all(map(has_room, run, texts)):
                for span, text in zip(run, texts, strict=True):
                    write((edges[span.first] + edges[span.last + 1]) / 2, text, "center", INK)
            elif following and following[0].state == "decode":
                found = sum(span.num_found for span in run)
                label_of[id(following[0])] = _tokens(sum(span.num_tokens for span in run), found)
        for span in [*run, *following[:1]]:
            if id(span) in label_of and has_room(span, label_of[id(span)] + " "):
                write(edges[span.first] + 3 / px, label_of[id(span)], "left", "white")


def _tokens(num_tokens: int, num_found: int) -> str:
    return f"{num_tokens}+{num_found}" if num_found else str(num_tokens)


def _draw_tokens(axes: Axes, trace: Trace, lives: Sequence[Life], edges: Sequence[float]) -> None:
    """Draw how many tokens each step computed, those of decodes at the bottom."""
    state_of = {
        (life.sequence_id, place): span.state
        for life in lives
        for span in life.spans
        for place in range(span.first, span.last + 1)
    }
    bars: dict[str, list[tuple[float, float, float, float]]] = {
        state: [] for state in ("decode", "prefill", "recompute", "failed")
    }
    for place, step in enumerate(trace.steps):
        counts = dict.fromkeys(bars, 0)
        for sequence_id, num_tokens in step.scheduled.items():
            counts[state_of[sequence_id, place]] += num_tokens
        below = 0
        for state, count in counts.items():
            if count:
                bars[state].append((edges[place], below, edges[place + 1], below + count))
            below += count
    for state, rectangles in bars.items():
        _add_bars(axes, rectangles, LOOKS[state], state, separate=False)
    most = max((step.num_tokens for step in trace.steps), default=0)
    axes.set_ylim(0, 1.08 * max(1, most))
    axes.set_yticks([0, most])
    axes.set_ylabel("tokens", fontsize=8.5, color=INK)


def _add_bars(
    axes: Axes, bars: Iterable[tuple[float, float, float, float]], look: Look, name: str, separate: bool = True
) -> None:
    """Rectangles (left, bottom, right, top) as one collection, which is fast for thousands of them."""
    corners = [[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, y0, x1, y1 in bars]
    if not corners:
        return
    edge = "white" if separate and look.edge == "none" and look.height > 0.5 else look.edge
    bars_of_state = PolyCollection(
        corners, facecolors=look.face, edgecolors=edge, linewidths=0.6 if separate else 0, hatch=look.hatch or None
    )
    bars_of_state.set_label(name)
    axes.add_collection(bars_of_state, autolim=False)


def _edges(trace: Trace, by: str) -> tuple[list[float], str]:
    """Where each step begins and the last one ends, and what the axis counts."""
    if not trace.steps:
        raise ValueError("the trace has no steps yet: nothing to draw")
    if by == "step":
        return [place - 0.5 for place in range(len(trace.steps) + 1)], "step"
    if by != "time":
        raise ValueError(f"by={by!r}: must be step or time")
    last = trace.steps[-1]
    times = [step.began_s for step in trace.steps] + [last.began_s if last.ended_s is None else last.ended_s]
    unit, name = (1.0, "seconds") if times[-1] - times[0] >= 2 else (1e-3, "milliseconds")
    return [(time - times[0]) / unit for time in times], name


def _key(lives: Sequence[Life]) -> list[tuple[Any, str]]:
    """A handle and a label for everything in the picture."""
    used = {span.state for life in lives for span in life.spans}
    key: list[tuple[Any, str]] = []
    for state, look in LOOKS.items():
        if state not in used:
            continue
        if look.height < 0.5:
            key.append((Line2D([], [], color=look.face, linewidth=2.5, solid_capstyle="butt"), look.words))
        else:
            finds = state == "prefill" and any(span.num_found for life in lives for span in life.spans)
            words = look.words + ": tokens computed + found stored" * finds
            key.append((Patch(facecolor=look.face, edgecolor=look.edge, hatch=look.hatch), words))
    if any(life.preempted for life in lives):
        key.append((Line2D([], [], **_preemption_mark(1)), "preempted"))
    return key


def _preemption_mark(num_rows: int) -> dict[str, Any]:
    size = 3.5 + min(2.5, 25 * max(0.0, _row_in(num_rows) - 0.08))
    return {
        "marker": "X", "color": INK, "linestyle": "", "markersize": size, "markeredgecolor": "white",
        "markeredgewidth": 0.6, "clip_on": False, "gid": "preempted",
    }  # fmt: skip


def _row_in(num_rows: int) -> float:
    return max(0.075, min(0.22, 3.2 / max(1, num_rows)))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
