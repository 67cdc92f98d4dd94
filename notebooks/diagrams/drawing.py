"""The vocabulary of the diagrams: boxes, cells, labels, arrows and lanes, written as SVG.

A line of text is plain, or it is marked as a whole: `code`, **bold** or _muted_.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from math import hypot
from typing import NamedTuple

Point = tuple[float, float]

TONES = {  # the colours of paged_infer/viz/style.py: naive, cached, static, paged and two of other engines
    "grey": "#b0b7c3",
    "amber": "#e0a458",
    "red": "#c1666b",
    "blue": "#2f6f9f",
    "violet": "#7a6a94",
    "green": "#4f7f6a",
}


class Theme(NamedTuple):
    """Colours of the panel and of text. ``strong`` and ``tint``: how far a tone is mixed with white, and the panel."""

    panel: str
    ink: str
    muted: str
    faint: str
    strong: float
    tint: float


LIGHT = Theme(panel="#fbfcfd", ink="#22303c", muted="#4c5863", faint="#d9dee5", strong=0.0, tint=0.76)
DARK = Theme(panel="#1c242c", ink="#e6ebf0", muted="#b8c2cc", faint="#3d4852", strong=0.3, tint=0.72)
SANS = "'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SIZE, SMALL, HEADING = 13, 12, 16  # pixels
HEAD = 8  # length of an arrow's head


def mixed(colour: str, other: str, share: float) -> str:
    """``colour`` with that share of ``other``."""
    pairs = [(int(colour[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


def colours(theme: Theme) -> dict[str, tuple[str, str]]:
    """The fill and the stroke of a box of each tone."""
    found = {
        "plain": (theme.panel, theme.muted),
        "empty": (theme.panel, theme.muted),
        "lane": (mixed(theme.faint, theme.panel, 0.45), "none"),
    }
    for tone, colour in TONES.items():
        strong = mixed(colour, "#ffffff", theme.strong)
        found[tone] = (mixed(colour, theme.panel, theme.tint), strong)
        found[f"solid-{tone}"] = (strong, strong)
    return found


def style_sheet() -> Iterator[str]:
    """Both themes. An <img> follows the browser's setting, not the page's: each theme has a panel of its own."""
    yield f"text {{ font: {SIZE}px {SANS}; }}"
    yield f"text.code {{ font-family: {MONO}; }}"
    yield "text.bold { font-weight: bold; }"
    yield f"text.heading {{ font-size: {HEADING}px; font-weight: bold; }}"
    yield f"text.muted, text.code {{ font-size: {SMALL}px; }}"
    yield ".empty, .dashed { stroke-dasharray: 4 3; }"
    yield "polyline { fill: none; stroke-width: 1.5; }"
    yield from rules(LIGHT)
    yield "@media (prefers-color-scheme: dark) {"
    yield from rules(DARK)
    yield "}"


def rules(theme: Theme) -> Iterator[str]:
    yield f".panel {{ fill: {theme.panel}; stroke: {theme.faint}; }}"
    yield f"text {{ fill: {theme.ink}; }} text.muted {{ fill: {theme.muted}; }}"
    yield f"polyline {{ stroke: {theme.muted}; }} polygon {{ fill: {theme.muted}; }}"
    for tone, (fill, stroke) in colours(theme).items():
        yield f"rect.{tone} {{ fill: {fill}; stroke: {stroke}; }}"
        if tone in TONES:
            yield f"polyline.{tone} {{ stroke: {stroke}; }} polygon.{tone} {{ fill: {stroke}; }}"


class Box(NamedTuple):
    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> Point:
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> Point:
        return self.x + self.width, self.y + self.height / 2

    @property
    def top(self) -> Point:
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> Point:
        return self.x + self.width / 2, self.y + self.height


def number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def attributes(**values: object) -> str:
    texts = {key.rstrip("_"): number(v) if isinstance(v, (int, float)) else v for key, v in values.items()}
    return " ".join(f'{key}="{escape(str(text))}"' for key, text in texts.items())


def styled(text: str) -> tuple[str, str]:
    """The class of a line of text, and the text without its marks."""
    for mark, name in (("`", "code"), ("**", "bold"), ("_", "muted")):
        if text.startswith(mark) and text.endswith(mark) and len(text) > 2 * len(mark):
            return name, text[len(mark) : -len(mark)]
    return "plain", text


class Drawing:
    """One diagram. ``description``: in words, for screen readers."""

    def __init__(self, width: float, height: float, title: str, description: str) -> None:
        self.width, self.height = width, height
        self.title, self.description = title, description
        self.elements: list[str] = []
        self._text(24, 34, title, "start", "heading")

    def _text(self, x: float, y: float, text: str, anchor: str, style: str) -> None:
        where = attributes(x=x, y=y, text_anchor=anchor, class_=style).replace("text_anchor", "text-anchor")
        self.elements.append(f"<text {where}>{escape(text, quote=False)}</text>")

    def label(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        """Text whose baseline is at ``y``. ``anchor``: what ``x`` is of it, "start", "middle" or "end"."""
        style, text = styled(text)
        self._text(x, y, text, anchor, style)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *lines: str,
        tone: str = "plain",
        radius: float = 4,
        foreign: bool = False,
    ) -> Box:
        """Lines of text centred in a rectangle. ``foreign``: they name another project's classes, not the package's."""
        self.elements.append('<g class="box foreign">' if foreign else '<g class="box">')
        self.elements.append(f"<rect {attributes(x=x, y=y, width=width, height=height, rx=radius, class_=tone)}/>")
        pitch = 17
        y_first = y + height / 2 - pitch * (len(lines) - 1) / 2 + 4.5
        for index, line in enumerate(lines):
            self.label(x + width / 2, y_first + pitch * index, line, "middle")
        self.elements.append("</g>")
        return Box(x, y, width, height)

    def cells(
        self, x: float, y: float, texts: Sequence[str], tones: str, width: float = 24, height: float = 24
    ) -> list[Box]:
        """A row of cells, ``width`` from one to the next. ``tones``: one for all, or as many with spaces between."""
        each = tones.split() * (1 if " " in tones else len(texts))
        return [
            self.box(x + width * i, y, width - 2, height, *filter(None, [text]), tone=tone, radius=2)
            for i, (text, tone) in enumerate(zip(texts, each, strict=True))
        ]

    def lane(self, x: float, y: float, width: float, height: float, name: str = "", *, below: bool = False) -> Box:
        """A grey area with its name in the top left corner, or in the lower one."""
        self.elements.append(f"<rect {attributes(x=x, y=y, width=width, height=height, rx=8, class_='lane')}/>")
        if name:
            self.label(x + 12, y + (height - 12 if below else 20), name)
        return Box(x, y, width, height)

    def line(self, *points: Point, tone: str = "", dashed: bool = False) -> None:
        style = f"{tone} dashed" if dashed else tone
        joined = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self.elements.append(f"<polyline {attributes(points=joined, class_=style.strip() or 'line')}/>")

    def arrow(self, *points: Point, tone: str = "", dashed: bool = False) -> None:
        """A line through ``points`` with a head at the last one."""
        (x0, y0), (x1, y1) = points[-2:]
        length = hypot(x1 - x0, y1 - y0)
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        base = x1 - HEAD * dx, y1 - HEAD * dy
        self.line(*points[:-1], base, tone=tone, dashed=dashed)
        side = HEAD / 2
        corners = ((x1, y1), (base[0] - side * dy, base[1] + side * dx), (base[0] + side * dy, base[1] - side * dx))
        joined = " ".join(f"{number(x)},{number(y)}" for x, y in corners)
        self.elements.append(f"<polygon {attributes(points=joined, class_=tone or 'line')}/>")

    def chain(self, *boxes: Box) -> None:
        """An arrow from the right of each box to the left of the next."""
        for box, following in pairwise(boxes):
            self.arrow(box.right, following.left)

    def svg(self) -> str:
        w, h = self.width, self.height
        size = attributes(width=w, height=h, viewBox=f"0 0 {number(w)} {number(h)}")
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title description">',
                f'<title id="title">{escape(self.title, quote=False)}</title>',
                f'<desc id="description">{escape(self.description, quote=False)}</desc>',
                "<style>",
                *style_sheet(),
                "</style>",
                f"<rect {attributes(x=0.5, y=0.5, width=w - 1, height=h - 1, rx=10, class_='panel')}/>",
                *self.elements,
                "</svg>\n",
            )
        )
