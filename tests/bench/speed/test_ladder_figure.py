"""The ladder picture shows what the report says."""

from __future__ import annotations

import pytest

from paged_infer.bench.metrics import Metrics
from paged_infer.bench.speed.measure import Entry, SpeedReport
from paged_infer.bench.speed.speed_figure import ladder_figure
from paged_infer.viz.style import BASELINE_COLOURS


def report(same_tokens: bool = True) -> SpeedReport:
    entries = [
        Entry("naive", Metrics(2.0, 50.0, peak_kv_bytes=0), [2.0], same_tokens=True),
        Entry("static", Metrics(1.0, 100.0, peak_kv_bytes=4 * 2**20, kv_fill=0.25), [1.0], same_tokens=True),
        Entry("paged", Metrics(0.5, 200.0, peak_kv_bytes=2 * 2**20, kv_fill=0.9375), [0.5], same_tokens=same_tokens),
    ]
    return SpeedReport("ladder", "a model", workload="2 requests", entries=entries)


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
    png = ladder_figure(report()).png()
    assert png.startswith(b"\x89PNG")
    assert len(png) < 60_000
