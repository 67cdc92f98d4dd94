"""The memory picture shows what the report says, and the paper's numbers beside it."""

from __future__ import annotations

import pytest

from paged_infer.bench.scheduling.memory_figure import fragmentation_figure
from paged_infer.bench.scheduling.memory_waste import (
    PAPER_SAVED,
    PAPER_SHARES,
    DatasetReport,
    MemoryReport,
    SharingReport,
    StrategyReport,
)


def report() -> MemoryReport:
    strategies = [
        StrategyReport(name, 0.1 * rank, 0.2, 0.1, 0.7 - 0.1 * rank, 0.5, 7.0, 0)
        for rank, name in enumerate(PAPER_SHARES, start=2)
    ]
    datasets = [
        DatasetReport(name, 10, 100.0, 200.0, strategies, {1: 1.0, 16: 0.97, 256: 0.5})
        for name in ("ShareGPT-like", "Alpaca-like")
    ]
    sharing = [SharingReport(d.name, "parallel sampling", n, n / 20) for d in datasets for n in (2, 4, 6)]
    return MemoryReport(1000, 16, 100, 0, datasets, sharing)


def test_bars_add_up_to_the_whole_memory_and_begin_with_tokens():
    sharegpt, alpaca, *_ = fragmentation_figure(report()).axes
    widths = [patch.get_width() for patch in alpaca.patches]
    assert widths[:4] == pytest.approx([20, 20, 10, 50])
    assert sum(widths) == pytest.approx(400)
    assert len(sharegpt.patches) == 2 * len(alpaca.patches)  # the paper's beside ours


def test_the_papers_bars_are_the_papers():
    sharegpt = fragmentation_figure(report()).axes[0]
    widths = [patch.get_width() for patch in sharegpt.patches]
    assert widths[4:8] == pytest.approx([100 * share for share in PAPER_SHARES["max"].values()])
    assert "96.3% in the paper" in [text.get_text() for text in sharegpt.texts]


def test_what_is_shared_stands_beside_what_the_paper_saved():
    sharing = fragmentation_figure(report()).axes[3]
    assert [patch.get_height() for patch in sharing.patches] == pytest.approx([10, 20, 30, 10, 20, 30])
    marks = [line.get_ydata()[0] for line in sharing.lines if len(line.get_ydata())]
    assert marks == pytest.approx([100 * s for n in ("ShareGPT-like", "Alpaca-like") for s in PAPER_SAVED[n].values()])


def test_the_picture_is_small_enough_for_a_notebook():
    png = fragmentation_figure(report()).png()
    assert png.startswith(b"\x89PNG")
    assert len(png) < 90_000
