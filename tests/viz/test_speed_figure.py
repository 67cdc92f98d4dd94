"""The speed pictures show what the report says."""

from __future__ import annotations

import pytest

from paged_infer.bench.floor import Floor
from paged_infer.bench.metrics import Metrics, Percentiles
from paged_infer.bench.roofline import Roofline
from paged_infer.bench.speed import Entry, SpeedReport
from paged_infer.viz.speed import speed_figure


def metrics(seconds: float, known: bool = True) -> Metrics:
    times = Percentiles(0.01 * seconds, 0.02 * seconds, 0.03 * seconds) if known else None
    share = 0.1 / seconds if known else None
    return Metrics(
        seconds,
        100 / seconds,
        200 / seconds,
        times,
        times,
        times,
        times,
        share,
        share,
        share,
        None,
        None,
        None,
    )


def report(command: str, entries: list[Entry]) -> SpeedReport:
    floor = Floor(0.1, 0.2, 0.2, 0.1)
    return SpeedReport(
        command,
        "a model",
        "float32",
        "auto",
        "8 requests",
        8,
        100,
        0,
        1,
        {},
        Roofline(1.0, 1.0, 1.0),
        floor,
        entries,
    )


def contenders() -> list[Entry]:
    return [
        Entry("paged", metrics(1.0), [1.0], first=metrics(4.0)),
        Entry("transformers static", metrics(2.0), [2.0], first=metrics(3.0)),
        Entry("mini-sglang", metrics(0.5, known=False), [0.5], first=metrics(0.6, known=False)),
    ]


def widths(axes):
    return [patch.get_width() for patch in axes.patches]


def words(axes):
    return [text.get_text() for text in axes.texts]


def test_bars_are_the_rates_and_say_their_share_of_the_floors():
    speed, first = speed_figure(report("throughput", contenders())).axes
    assert widths(speed) == [100.0, 50.0, 200.0]
    assert words(speed) == ["100 (10%)", "50 (5%)", "200"]
    assert widths(first) == pytest.approx([10.0, 20.0, 0.0])
    assert words(first)[-1] == "it does not say"


def test_latency_shows_first_and_settled_runs():
    _, waiting = speed_figure(report("latency", contenders())).axes
    assert widths(waiting) == pytest.approx([4000, 3000, 600, 1000, 2000, 500])
    assert words(waiting)[0] == "1,000, first run 4,000"


def test_load_has_a_bar_and_percentiles_for_each_load():
    entries = [
        Entry("1 client", metrics(4.0), [4.0], load=1.0),
        Entry("8 clients", metrics(1.0), [1.0], load=8.0),
        Entry("5.5 a second", metrics(2.0), [2.0], load=5.5),
    ]
    figure = speed_figure(report("load", entries))
    rate, first, gaps = figure.axes
    assert [patch.get_height() for patch in rate.patches] == [25.0, 100.0, 50.0]
    assert [label.get_text() for label in rate.get_xticklabels()] == ["1", "8", "5.5"]
    assert next(list(line.get_ydata()) for line in first.lines) == pytest.approx([40.0, 10.0])
    assert len(gaps.lines) == 6
    assert len(figure._repr_png_()) < 80_000
