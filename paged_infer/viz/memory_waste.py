"""What KV memory is spent on: a stacked bar for each system, as in the PagedAttention paper's Figure 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from paged_infer.viz.style import FAINT, INK, RUNG_COLOURS, Picture, add_key, new_picture

Systems = Sequence[tuple[str, Mapping[str, float]]]

WIDTH_IN = 7.4
BAR_IN = 0.3
TOKENS = "tokens"
# From what serves to what is lost. A kind that is not here gets one of the others, in order of appearance.
KIND_COLOURS = {
    TOKENS: RUNG_COLOURS["paged"],
    "reserved": "#e0a458",
    "internal": "#c1666b",
    "external": "#b0b7c3",
}
OTHER_COLOURS = ("#e8c99b", "#c1666b", "#b0b7c3", "#8d8fb0", "#d9dee5")
NARROWEST_LABEL = 0.05  # of the memory


def memory_waste_figure(
    systems: Systems | Mapping[str, Systems],
    *,
    published: Mapping[str, Any] | None = None,
    title: str = "share of the KV memory in use",
) -> Picture:
    """Stacked bars of how each system spends the memory.

    Args:
        systems: (name, share of the memory by kind), the first at the top; or such a list for each workload, by its
            name, one panel each. Shares are between 0 and 1, and of one system at most 1 in all; the kind "tokens" is
            what the memory is for.
        published: the share of tokens that others have reported, by system (in panels: by workload, then system);
            marked on its bar.

    Raises:
        ValueError: no system, a share out of range, or a mark for a system that is not there.
    """
    panels = dict(systems) if isinstance(systems, Mapping) else {"": systems}
    marks: dict[str, Mapping[str, float]]
    marks = dict(published or {}) if isinstance(systems, Mapping) else {"": published or {}}
    _check(panels, marks)
    colours = _colours([kind for panel in panels.values() for _, shares in panel for kind in shares])
    most = max(len(panel) for panel in panels.values())
    picture = new_picture(WIDTH_IN, 0.85 + BAR_IN * most + 0.2 * any(panels))
    for axes, (workload, panel) in zip(
        picture.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        _draw_panel(axes, panel, marks.get(workload, {}), colours)
        axes.set_title(workload, fontsize=9, color=INK, loc="left")
    names = [[name for name, _ in panel] for panel in panels.values()]
    if len(panels) > 1 and all(these == names[0] for these in names):
        for axes in picture.axes[1:]:
            axes.set_yticklabels([])
    key: list[tuple[Any, str]] = [(Patch(facecolor=colour), kind) for kind, colour in colours.items()]
    if any(marks.values()):
        key.append(
            (Line2D([], [], marker="D", color="white", markeredgecolor=INK, linestyle=""), "published")
        )
    add_key(picture, title, key)
    return picture


def _draw_panel(
    axes: Axes, systems: Systems, published: Mapping[str, float], colours: Mapping[str, str]
) -> None:
    for row, (name, shares) in enumerate(systems):
        left = 0.0
        for kind, colour in colours.items():
            share = shares.get(kind, 0.0)
            if share <= 0:
                continue
            axes.barh(
                row, share, left=left, height=0.72, color=colour, edgecolor="white", linewidth=0.6, label=kind
            )
            if share >= NARROWEST_LABEL:
                words = f"{100 * share:.1f}" if kind == TOKENS else f"{100 * share:.0f}"
                axes.text(
                    left + share / 2, row, words, ha="center", va="center_baseline", fontsize=8,
                    color="white" if kind == TOKENS else INK,
                )  # fmt: skip
            left += share
        if name in published:
            axes.plot(
                published[name], row, "D", color="white", markeredgecolor=INK, markersize=5, gid="published"
            )
    axes.set_yticks(range(len(systems)), [name for name, _ in systems])
    axes.set_ylim(len(systems) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def _colours(kinds: Sequence[str]) -> dict[str, str]:
    """Every kind that occurs: the known ones first, in their order."""
    used = dict.fromkeys(kinds)
    colours = {kind: colour for kind, colour in KIND_COLOURS.items() if kind in used}
    others = [kind for kind in used if kind not in colours]
    spare = [colour for colour in OTHER_COLOURS if colour not in colours.values()]
    return {**colours, **{kind: spare[i % len(spare)] for i, kind in enumerate(others)}}


def _check(panels: Mapping[str, Systems], marks: Mapping[str, Mapping[str, float]]) -> None:
    if not panels or not all(panels.values()):
        raise ValueError("no system to draw")
    for panel in panels.values():
        for name, shares in panel:
            wrong = {kind: share for kind, share in shares.items() if not 0 <= share <= 1}
            if wrong or sum(shares.values()) > 1 + 1e-6:
                raise ValueError(
                    f"shares of {name!r} are between 0 and 1, and at most 1 in all: {dict(shares)}"
                )
    strangers = [
        name
        for workload, these in marks.items()
        for name in these
        if name not in dict(panels.get(workload, ()))
    ]
    if strangers:
        raise ValueError(f"published shares for {strangers}, which are not among the systems")
