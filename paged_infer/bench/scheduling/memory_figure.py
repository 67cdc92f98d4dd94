"""The memory picture: what KV memory holds under four ways to allocate it, and what sharing saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from paged_infer.bench.scheduling.memory_waste import (
    PAPER_SAVED,
    PAPER_SHARES,
    DatasetReport,
    MemoryReport,
    SharingReport,
)
from paged_infer.viz.style import BASELINE_COLOURS, INK, Picture, new_picture, tidy_axes

PART_COLOURS = {
    "tokens": BASELINE_COLOURS["paged"],
    "reserved": BASELINE_COLOURS["cached"],
    "internal": BASELINE_COLOURS["static"],
    "external": BASELINE_COLOURS["naive"],
}
PART_NAMES = {
    "tokens": "holds tokens",
    "reserved": "reserved, used later",
    "internal": "reserved, never used",
    "external": "lost to holes and rounding",
}
DATASET_COLOURS = {"ShareGPT-like": BASELINE_COLOURS["paged"], "Alpaca-like": BASELINE_COLOURS["static"]}
OURS, PAPER = 0.44, 0.2  # heights of the bars
FAINTER = 0.55


def fragmentation_figure(report: MemoryReport) -> Picture:
    """Above: the use of all slots, for each data set. Below: block sizes (left), and what samples share (right)."""
    figure = new_picture(8.0, 5.6)
    panels = figure.subplots(2, 2, height_ratios=(1.25, 1.0))
    for axes, dataset in zip(panels[0], report.datasets, strict=True):
        _stack_panel(axes, dataset, PAPER_SHARES if dataset.name == "ShareGPT-like" else {})
    panels[0][1].set_yticklabels([])
    _block_size_panel(panels[1][0], report.datasets, report.block_size)
    _sharing_panel(panels[1][1], report.sharing)
    patches = [Patch(color=PART_COLOURS[part], label=name) for part, name in PART_NAMES.items()]
    figure.legend(handles=patches, loc="outside upper center", ncols=4, frameon=False, fontsize=8.5)
    return figure


def _stack_panel(axes: Axes, dataset: DatasetReport, paper: Mapping[str, Mapping[str, float]]) -> None:
    for row, strategy in enumerate(dataset.strategies):
        shares = {part: asdict(strategy)[part] for part in PART_COLOURS}
        _stack(axes, row, shares, OURS, 1.0)
        axes.text(102, row, f"{strategy.tokens:.1%}", va="center", fontsize=8.5, color=INK, weight="bold")
        if strategy.name in paper:
            beneath = row + (OURS + PAPER) / 2
            _stack(axes, beneath, paper[strategy.name], PAPER, FAINTER)
            label = f"{paper[strategy.name]['tokens']:.1%} in the paper"
            axes.text(102, beneath + 0.06, label, va="center", fontsize=7, color=INK)
    names = [
        strategy.name if strategy.name == "paged" else f"reserve {strategy.name}" for strategy in dataset.strategies
    ]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.3, -0.5)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 137 if paper else 118)
    axes.set_xticks(range(0, 101, 20), [f"{percent} %" for percent in range(0, 101, 20)])
    tidy_axes(axes, grid=None, title=f"{dataset.name}: share of all KV memory", labelsize=8.5)


def _stack(axes: Axes, row: float, shares: Mapping[str, float], height: float, alpha: float) -> None:
    left = 0.0
    for part, colour in PART_COLOURS.items():
        percent = 100 * shares[part]
        axes.barh(row, percent, height, left, color=colour, alpha=alpha, linewidth=0)
        left += percent


def _block_size_panel(axes: Axes, datasets: list[DatasetReport], block_size: int) -> None:
    for dataset in datasets:
        sizes = [*dataset.fill_by_block_size]
        percents = [100 * fill for fill in dataset.fill_by_block_size.values()]
        axes.plot(sizes, percents, "o-", markersize=3.5, linewidth=1.6, color=DATASET_COLOURS[dataset.name])
        axes.lines[-1].set_label(dataset.name)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    axes.axvline(block_size, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(0, 104)
    axes.set_yticks(range(0, 101, 25), [f"{percent} %" for percent in range(0, 101, 25)])
    tidy_axes(axes, title="paged: blocks in use that hold tokens", labelsize=8.5)
    axes.set_xlabel("block size, tokens", fontsize=8.5, color=INK)


def _sharing_panel(axes: Axes, sharing: list[SharingReport]) -> None:
    places = [place + place // 3 for place in range(len(sharing))]  # a gap between kinds and data sets, three a group
    axes.bar(places, [100 * one.saved for one in sharing], color=[DATASET_COLOURS[s.dataset] for s in sharing])
    for place, one in zip(places, sharing, strict=True):
        top = 100 * one.saved
        if one.kind == "parallel sampling" and one.width in PAPER_SAVED.get(one.dataset, {}):
            percent = 100 * PAPER_SAVED[one.dataset][one.width]
            axes.plot([place - 0.4, place + 0.4], [percent, percent], color=INK, linewidth=1.6)
            top = max(top, percent)  # the number stands above both
        axes.annotate(
            f"{one.saved:.0%}", (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=8, color=INK
        )
    axes.plot([], [], color=INK, linewidth=1.6, label="the paper's")
    axes.legend(frameon=False, fontsize=8, loc="upper center")
    names = [f"{one.width}\n{one.dataset}" if one.width == 4 else f"{one.width}\n" for one in sharing]
    axes.set_xticks(places, names)
    axes.set_ylim(0, 130 * max(one.saved for one in sharing))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    tidy_axes(axes, grid=None, title="blocks saved by sharing a prompt", labelsize=8.5)
    axes.set_xlabel("samples of a request, n", fontsize=8.5, color=INK)
