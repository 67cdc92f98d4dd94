"""The diagrams of the course: stored as drawn, legible in both themes, and true to the package that they name.

Text is measured in DejaVu Sans, which is wider than the other fonts of the drawings' stacks.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
import xml.etree.ElementTree as ET
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pytest
from diagrams import DRAWINGS, FOLDER, stored
from diagrams.drawing import DARK, HEADING, LIGHT, SIZE, SMALL, TONES, colours
from matplotlib.ft2font import FT2Font

from paged_infer.control.sequence_state import TRANSITIONS
from paged_infer.storyteller import PATH
from paged_infer.viz.style import BASELINE_COLOURS, INK

PACKAGE = Path(__file__).parent.parent / "paged_infer"
SVG = "{http://www.w3.org/2000/svg}"
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
WIDEST = 860
EACH_DRAWING = pytest.mark.parametrize("name", DRAWINGS)


class Area(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def holds(self, other: Area, margin: float = 0) -> bool:
        lefts = self.left + margin <= other.left and self.top + margin <= other.top
        return lefts and other.right <= self.right - margin and other.bottom <= self.bottom - margin

    def meets(self, other: Area) -> bool:
        wide = self.left < other.right and other.left < self.right
        return wide and self.top < other.bottom and other.top < self.bottom

    def shrunk(self, by: float) -> Area:
        return Area(self.left + by, self.top + by, self.right - by, self.bottom - by)


class Text(NamedTuple):
    words: str
    style: str
    area: Area
    box: Area | None  # None for a label
    tone: str  # of what lies under it
    is_foreign: bool


@cache
def font(file: str, size: int) -> FT2Font:
    one = FT2Font(str(FONTS / file))
    one.set_size(size, 72)
    return one


def area_of_text(element: ET.Element) -> Area:
    style = element.get("class", "")
    size = {"heading": HEADING, "muted": SMALL, "code": SMALL}.get(style, SIZE)
    file = {"heading": "DejaVuSans-Bold.ttf", "bold": "DejaVuSans-Bold.ttf", "code": "DejaVuSansMono.ttf"}.get(style)
    measure = font(file or "DejaVuSans.ttf", size)
    measure.set_text(element.text or "")
    width = measure.get_width_height()[0] / 64
    x, y = float(element.get("x", 0)), float(element.get("y", 0))
    left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[element.get("text-anchor", "start")] * width
    return Area(left, y - 0.75 * size, left + width, y + 0.22 * size)


def area_of(rect: ET.Element) -> Area:
    x, y, width, height = (float(rect.get(key, 0)) for key in ("x", "y", "width", "height"))
    return Area(x, y, x + width, y + height)


@cache
def root(name: str) -> ET.Element:
    return ET.fromstring(DRAWINGS[name]().svg())


def lanes(name: str) -> list[Area]:
    return [area_of(one) for one in root(name).findall(f"{SVG}rect") if one.get("class") == "lane"]


def boxes(name: str) -> list[Area]:
    return [area_of(one) for one in root(name).iterfind(f".//{SVG}g/{SVG}rect")]


@cache
def texts(name: str) -> list[Text]:
    found = []
    for element in root(name):
        if element.tag == f"{SVG}text":
            area = area_of_text(element)
            tone = "lane" if any(lane.holds(area) for lane in lanes(name)) else "plain"
            found.append(Text(element.text or "", element.get("class", ""), area, None, tone, False))
        elif element.tag == f"{SVG}g":
            (rect,) = element.findall(f"{SVG}rect")
            box, tone, is_foreign = area_of(rect), rect.get("class", ""), "foreign" in element.get("class", "")
            for one in element.findall(f"{SVG}text"):
                found.append(Text(one.text or "", one.get("class", ""), area_of_text(one), box, tone, is_foreign))
    return found


def points(element: ET.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in element.get("points", "").split())]


def crosses(start: tuple[float, float], end: tuple[float, float], area: Area) -> bool:
    """Whether a straight line passes through an area: Liang and Barsky's clipping."""
    (x0, y0), (x1, y1) = start, end
    first, last = 0.0, 1.0
    sides = (x0 - x1, x0 - area.left), (x1 - x0, area.right - x0), (y0 - y1, y0 - area.top), (y1 - y0, area.bottom - y0)
    for moves, room in sides:
        if moves == 0 and room <= 0:
            return False
        if moves < 0:
            first = max(first, room / moves)
        elif moves > 0:
            last = min(last, room / moves)
    return first < last


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_every_stored_file_has_a_drawing():
    assert {path.stem for path in FOLDER.glob("*.svg")} == set(DRAWINGS)


def test_the_colours_are_those_of_the_figures():
    names = {"grey": "naive", "amber": "cached", "red": "static", "blue": "paged"}
    assert all(TONES[tone] == BASELINE_COLOURS[name] for tone, name in names.items())
    assert set(TONES.values()) <= set(BASELINE_COLOURS.values())
    assert LIGHT.ink == INK


@EACH_DRAWING
class TestDrawings:
    def test_it_is_stored_as_it_is_drawn(self, name):
        assert stored(name).read_text("utf-8") == DRAWINGS[name]().svg(), "run: python -m notebooks.diagrams"

    def test_it_has_a_title_and_a_description_and_fits_a_page(self, name):
        title, description = root(name).find(f"{SVG}title"), root(name).find(f"{SVG}desc")
        assert title is not None and title.text
        assert description is not None and len((description.text or "").split()) >= 15
        assert float(root(name).get("width", 0)) <= WIDEST

    def test_each_text_fits_its_box_or_the_panel(self, name):
        panel = Area(0, 0, float(root(name).get("width", 0)), float(root(name).get("height", 0)))
        for text in texts(name):
            assert panel.holds(text.area, margin=12), text.words
            assert text.box is None or text.box.holds(text.area, margin=1), text.words

    def test_no_text_lies_on_another_or_on_a_box_that_is_not_its_own(self, name):
        for one, other in combinations(texts(name), 2):
            assert not one.area.meets(other.area), (one.words, other.words)
        for text in texts(name):
            for box in boxes(name):
                assert box == text.box or not box.meets(text.area), text.words

    def test_no_line_crosses_a_text_or_a_box(self, name):
        for line in root(name).iterfind(f"{SVG}polyline"):
            for start, end in pairwise(points(line)):
                for text in texts(name):
                    assert not crosses(start, end, text.area), text.words
                for box in boxes(name):
                    assert not crosses(start, end, box.shrunk(1)), (start, end, box)

    @pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
    def test_text_has_enough_contrast(self, name, theme):
        for text in texts(name):
            colour = theme.muted if text.style == "muted" else theme.ink
            assert contrast(colour, colours(theme)[text.tone][0]) >= 4.5, (text.words, text.tone)

    def test_the_names_exist_in_the_package(self, name):
        methods, names = package_names()
        for text in texts(name):
            if text.style != "code" or text.is_foreign:
                continue
            for dotted in re.findall(r"[A-Za-z_][\w.]*", text.words):
                owner, _, member = dotted.partition(".")
                assert keyword.iskeyword(dotted) or owner in names, dotted
                assert not member or member in methods.get(owner, ()), dotted


@cache
def package_names() -> tuple[dict[str, set[str]], set[str]]:
    """The methods of every class, and every name that is defined or used."""
    methods: dict[str, set[str]] = {}
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                own = methods.setdefault(node.name, set())
                own |= {one.name for one in node.body if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))}
            match node:
                case ast.ClassDef(name=found) | ast.FunctionDef(name=found) | ast.AsyncFunctionDef(name=found):
                    names.add(found)
                case ast.Name(id=found) | ast.arg(arg=found) | ast.Attribute(attr=found):
                    names.add(found)
    return methods, names


def test_the_states_of_a_sequence_have_an_arrow_for_each_transition():
    states = {text.words.lower(): text.box for text in texts("request_life") if text.box and text.style == "code"}

    def state_at(point: tuple[float, float]) -> str | None:
        x, y = point
        touched = (name for name, box in states.items() if box.shrunk(-1).holds(Area(x, y, x, y)))
        return next(touched, None)

    lines = root("request_life").iterfind(f"{SVG}polyline")
    heads = root("request_life").iterfind(f"{SVG}polygon")
    drawn = {(state_at(points(line)[0]), state_at(points(head)[0])) for line, head in zip(lines, heads, strict=True)}
    allowed = {(state.value, following.value) for state, each in TRANSITIONS.items() for following in each}
    assert allowed <= drawn
    assert drawn - allowed == {(None, "waiting"), ("running", "running")}


def test_the_shapes_of_a_layer_are_those_of_the_weights():
    with (PATH / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    rows = {key.removeprefix("model.layers.0."): value["shape"][0] for key, value in header.items() if ".0." in key}
    words = {text.words for text in texts("decoder_layer")}
    qkv = sum(rows[f"self_attn.{one}_proj.weight"] for one in "qkv")
    up = rows["mlp.gate_proj.weight"] + rows["mlp.up_proj.weight"]
    for width in (qkv, up, rows["mlp.up_proj.weight"], rows["mlp.down_proj.weight"], rows["self_attn.o_proj.weight"]):
        assert f"[T, {width}]" in words
    dim = rows["self_attn.q_norm.weight"]
    for one in "qkv":
        assert f"{one} [T, {rows[f'self_attn.{one}_proj.weight'] // dim}, {dim}]" in words


def test_the_online_softmax_ends_with_the_exact_output():
    scores, values = (1, 3, 2, 5, 4, 2), (4, 2, 2, 8, 2, 0)
    weights = [2.0**score for score in scores]
    exact = sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)
    assert f"o / ℓ = {exact:.5g}" in {text.words for text in texts("online_softmax")}
