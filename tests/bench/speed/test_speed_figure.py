"""The speed pictures show what the report says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paged_infer.bench.floor import Floor
from paged_infer.bench.metrics import Metrics, Percentiles
from paged_infer.bench.roofline import Roofline
from paged_infer.bench.speed.measure import Entry, SpeedReport
from paged_infer.bench.speed.speed_figure import speed_figure


def metrics(seconds: float, known: bool = True) -> Metrics:
    times = Percentiles(0.01 * seconds, 0.02 * seconds, 0.03 * seconds) if known else None
    share = 0.1 / seconds if known else None
    return Metrics(
        seconds,
        100 / seconds,
        200 / seconds,
        **dict.fromkeys(("ttft_s", "tpot_s", "itl_s", "latency_s"), times),
        **dict.fromkeys(("mbu", "mfu", "floor_share"), share),
    )


def report(command: str, entries: list[Entry]) -> SpeedReport:
    floor = Floor(0.1, 0.2, 0.2, 0.1)
    return SpeedReport(
        command, "a model", "float32", "auto", "8 requests", 8, 100, 0, 1, {}, Roofline(1.0, 1.0, 1.0), floor, entries
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
    assert words(first)[-1] == "not reported"


def test_latency_shows_first_and_settled_runs():
    _, waiting = speed_figure(report("latency", contenders())).axes
    assert widths(waiting) == pytest.approx([1000, 2000, 500, 4000, 3000, 600])
    assert words(waiting)[:2] == ["1,000", "4,000"]
    settled, first = waiting.patches[0], waiting.patches[3]  # neither hides the other, whichever is longer
    assert settled.get_y() + settled.get_height() <= first.get_y()


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
    assert len(figure.png()) < 80_000


def test_the_servers_lines_are_its_series_over_the_clients():
    def whole(seconds: float) -> Metrics:
        return replace(metrics(seconds), ttft_s=None)

    entries = [
        Entry("LLM.generate", metrics(0.8), [0.8]),
        Entry("4 clients", whole(2.0), [2.0], load=4.0, series="the server"),
        Entry("32 clients", whole(1.0), [1.0], load=32.0, series="the server"),
        Entry("4 clients, streaming", metrics(4.0), [4.0], load=4.0, series="streaming"),
        Entry("32 clients, streaming", metrics(2.0), [2.0], load=32.0, series="streaming"),
        Entry("4 clients, cached rung", whole(10.0), [10.0], load=4.0, series="cached rung"),
        Entry("5 a second, streaming", metrics(1.0), [1.0], load=5.0, series="arrivals"),
    ]
    speed, latency, first, arrivals = speed_figure(report("serve", entries)).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in speed.lines}
    assert lines == {
        "the server": [50.0, 100.0],
        "streaming": [25.0, 50.0],
        "cached rung": [10.0],
        "LLM.generate, without HTTP": [125.0, 125.0],
    }
    colours = [line.get_color() for line in speed.lines]
    assert len(set(colours)) == len(colours)
    assert [len(axes.lines) for axes in (latency, first, arrivals)] == [6, 2, 4]
    assert list(latency.lines[0].get_ydata()) == pytest.approx([20.0, 10.0])
    assert list(latency.lines[1].get_ydata()) == pytest.approx([60.0, 30.0])
