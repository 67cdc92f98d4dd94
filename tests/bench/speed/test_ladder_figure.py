"""The ladder picture shows what the report says."""

from __future__ import annotations

import pytest

from paged_infer.bench.speed.ladder import LadderReport, RungReport
from paged_infer.bench.speed.ladder_figure import ladder_figure
from paged_infer.viz.style import BASELINE_COLOURS


def report(same_tokens: bool = True) -> LadderReport:
    rungs = [
        RungReport("naive", 2.0, 50.0, 0.1, 0, None, True),
        RungReport("static", 1.0, 100.0, 0.1, 4 * 2**20, 0.25, True),
        RungReport("paged", 0.5, 200.0, 0.1, 2 * 2**20, 0.9375, same_tokens),
    ]
    return LadderReport("a model", "2 requests", 2, 100, 0, 1, {}, rungs)


def bars(axes):
    return [patch.get_width() for patch in axes.patches]


def test_bars_are_as_long_as_the_numbers():
    speed, memory = ladder_figure(report()).axes
    assert bars(speed) == [50.0, 100.0, 200.0]
    assert bars(memory) == pytest.approx([0.0, 4.0, 2.0, 0.0, 1.0, 1.875])


def test_each_rung_has_its_own_colour():
    speed, _ = ladder_figure(report()).axes
    assert len(set(BASELINE_COLOURS.values())) == len(BASELINE_COLOURS)
    assert len({patch.get_facecolor() for patch in speed.patches}) == 3


@pytest.mark.parametrize(("same", "title"), [(True, "same tokens on every rung"), (False, "TOKENS DIFFER")])
def test_the_title_says_whether_the_tokens_agree(same, title):
    assert title in ladder_figure(report(same)).get_suptitle()


def test_the_picture_is_small_enough_for_a_notebook():
    png = ladder_figure(report())._repr_png_()
    assert png.startswith(b"\x89PNG")
    assert len(png) < 60_000
