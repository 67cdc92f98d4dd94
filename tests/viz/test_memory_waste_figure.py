"""Bars are as long as the shares, and say so."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex

from paged_infer.viz.memory_waste import KIND_COLOURS, memory_waste_figure

SYSTEMS = [
    ("max length", {"tokens": 0.25, "reserved": 0.25, "internal": 0.5}),
    ("paged", {"tokens": 0.97, "internal": 0.03}),
]


def bars(axes):
    """{(system's row, colour): (left, width)}"""
    return {
        (row, to_hex(bar.get_facecolor())): (round(float(bar.get_x()), 9), round(float(bar.get_width()), 9))
        for bar in axes.patches
        for row in [round(bar.get_y() + bar.get_height() / 2)]
    }


def test_bars_are_stacked_shares():
    (axes,) = memory_waste_figure(SYSTEMS).axes
    tokens, reserved, internal = (KIND_COLOURS[kind] for kind in ("tokens", "reserved", "internal"))
    assert bars(axes) == {
        (0, tokens): (0.0, 0.25),
        (0, reserved): (0.25, 0.25),
        (0, internal): (0.5, 0.5),
        (1, tokens): (0.0, 0.97),
        (1, internal): (0.97, 0.03),
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["max length", "paged"]
    assert [text.get_text() for text in axes.texts] == [
        "25.0",
        "25",
        "50",
        "97.0",
    ]  # the last one has no room
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first is on top


def test_the_key_names_what_is_there_and_unknown_kinds_get_colours():
    figure = memory_waste_figure([("a", {"padding": 0.5, "tokens": 0.25, "swap": 0.25})], title="waste")
    key = figure.legends[0]
    assert [text.get_text() for text in key.get_texts()] == ["tokens", "padding", "swap"]
    assert key.get_title().get_text() == "waste"
    assert len({colour for _, colour in bars(figure.axes[0])}) == 3


def test_each_workload_has_its_panel_and_published_shares_are_marked():
    figure = memory_waste_figure(
        {"ShareGPT-like": SYSTEMS, "Alpaca-like": SYSTEMS}, published={"ShareGPT-like": {"paged": 0.963}}
    )
    first, second = figure.axes
    assert (first.get_title("left"), second.get_title("left")) == ("ShareGPT-like", "Alpaca-like")
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in first.lines] == [([0.963], [1])]
    assert not second.lines and "published" in [t.get_text() for t in figure.legends[0].get_texts()]
    assert [label.get_text() for label in second.get_yticklabels()] == ["", ""]  # the same as on the left
    (alone,) = memory_waste_figure(SYSTEMS, published={"paged": 0.963}).axes
    assert list(alone.lines[0].get_xdata()) == [0.963]


@pytest.mark.parametrize(
    ("systems", "options", "message"),
    [
        ([], {}, "no system to draw"),
        ({"a": []}, {}, "no system to draw"),
        ([("paged", {"tokens": 96.3})], {}, "shares of 'paged' are between 0 and 1, and at most 1 in all"),
        ([("paged", {"tokens": 0.8, "internal": 0.3})], {}, "at most 1 in all"),
        (SYSTEMS, {"published": {"orca": 0.2}}, r"published shares for \['orca'\], which are not among"),
        ({"a": SYSTEMS}, {"published": {"b": {"paged": 0.2}}}, r"published shares for \['paged'\]"),
    ],
)
def test_data_that_cannot_be_drawn_is_refused(systems, options, message):
    with pytest.raises(ValueError, match=message):
        memory_waste_figure(systems, **options)


def test_nothing_is_printed_and_files_are_small(capfd, tmp_path):
    memory_waste_figure({"a": SYSTEMS, "b": SYSTEMS}).save(tmp_path / "waste.png")
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "waste.png").stat().st_size < 60_000
