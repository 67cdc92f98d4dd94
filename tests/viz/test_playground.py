"""A playground draws what its sliders say, and carries a still picture for where no widget can run."""

from __future__ import annotations

import io
import sys
from base64 import b64decode
from typing import Any

import pytest
from IPython.core.formatters import DisplayFormatter

from paged_infer.viz.playground import Playground
from paged_infer.viz.style import Picture, new_picture

WIDGET = "application/vnd.jupyter.widget-view+json"


class Drawing:
    """Draws a bar of the height it is told, and remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **values: Any) -> Picture:
        self.calls.append(values)
        picture = new_picture(2, 1)
        picture.subplots().bar([0], [values["height"]])
        return picture


@pytest.fixture
def drawing() -> Drawing:
    pytest.importorskip("ipywidgets")
    return Drawing()


def test_it_draws_at_once_and_whenever_a_slider_moves(drawing):
    playground = Playground(drawing, height=(0.0, 2.0, 1.0), top_k=(0, 50, 5), model=["small", "large"])
    first = playground.png
    playground.sliders["height"].value = 2.0
    assert drawing.calls == [
        {"height": 1.0, "top_k": 5, "model": "small"},
        {"height": 2.0, "top_k": 5, "model": "small"},
    ]
    assert playground.png != first and playground.widget.children[1].value == playground.png
    playground.move(model="large", top_k=7)
    assert playground.values == drawing.calls[-1] == {"height": 2.0, "top_k": 7, "model": "large"}


def test_integers_make_an_integer_slider_and_a_fourth_number_is_the_step(drawing):
    playground = Playground(drawing, height=(1, 9, 3), width=(0.0, 1.0, 0.5), depth=(0.0, 1.0, 0.5, 0.25))
    kinds = {name: (type(slider).__name__, slider.step) for name, slider in playground.sliders.items()}
    assert kinds == {"height": ("IntSlider", 1), "width": ("FloatSlider", 1 / 40), "depth": ("FloatSlider", 0.25)}


def test_a_still_picture_stands_beside_the_widget(drawing):
    playground = Playground(drawing, height=(1, 9, 3))
    bundle, shown = playground._repr_mimebundle_()
    assert bundle[WIDGET]["model_id"] == playground.widget.model_id
    assert b64decode(bundle["image/png"]) == Drawing()(height=3).png()
    assert shown == {"image/png": {"width": 200, "height": 100}}
    assert bundle["text/plain"] == "Playground: height=3"  # nbval compares this


def size_of(png: bytes) -> tuple[int, int]:
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def test_the_widgets_picture_has_twice_the_dots_of_the_size_that_it_is_shown_in(drawing):
    playground = Playground(drawing, height=(1, 9, 3))
    image = playground.widget.children[1]
    assert (image.layout.width, image.layout.height, image.layout.max_width) == ("200px", "auto", "100%")
    assert size_of(image.value) == (400, 200)


def test_a_notebook_shows_twice_the_dots_in_the_width_of_the_picture_and_few_colours_take_few_bytes():
    picture = Drawing()(height=3)
    picture.axes[0].set_title("words, whose edges have many shades")
    png, shown = DisplayFormatter().format(picture)
    assert shown["image/png"] == {"width": 200, "height": 100}
    assert size_of(png["image/png"]) == (400, 200)
    every_colour = io.BytesIO()
    picture.savefig(every_colour, dpi=200)
    assert len(png["image/png"]) < 0.6 * len(every_colour.getvalue())


def test_numbers_to_choose_from_are_in_order_and_other_choices_as_given(drawing):
    choices = {"bits": [16, 8, 32], "causal": [True, False], "model": ["small", "large"]}
    playground = Playground(drawing, height=(1, 9, 3), **choices)
    assert playground.values == {"height": 3, "bits": 16, "causal": True, "model": "small"}
    assert playground.sliders["bits"].options == (8, 16, 32)
    assert playground.sliders["causal"].options == (True, False)
    assert playground.sliders["model"].options == ("small", "large")


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ({}, "needs a control"),
        ({"height": (0, 2, 3)}, r"height=3: must be within \[0, 2\]"),
        ({"height": (0, 2)}, r"height=\(0, 2\): must be \(low, high, start\)"),
        ({"height": []}, r"height=\[\]: must be"),
    ],
)
def test_controls_that_cannot_be_are_refused(drawing, controls, message):
    with pytest.raises(ValueError, match=message):
        Playground(drawing, **controls)
    assert drawing.calls == []


def test_a_move_that_cannot_be_moves_nothing(drawing):
    playground = Playground(drawing, height=(0, 2, 1), model=["small"])
    for values, message in (
        ({"height": 2, "model": "huge"}, r"model='huge': must be one of \['small'\]"),
        ({"height": 3}, r"height=3: must be within \[0, 2\]"),
        ({"depth": 1}, "no control is named 'depth'; known: height, model"),
    ):
        with pytest.raises(ValueError, match=message):
            playground.move(**values)
    assert playground.values == {"height": 1, "model": "small"}


def test_without_ipywidgets_one_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'paged-infer\[notebooks\]'") as raised:
        Playground(Drawing(), height=(0, 2, 1))
    assert raised.value.name == "ipywidgets"  # by which a notebook run as a script passes over the cell
