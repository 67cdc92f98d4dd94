"""A few sliders and the picture that a function draws for them; a still picture if no widget can run."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from types import ModuleType
from typing import Any

from paged_infer.viz.style import Picture

NUM_STEPS = 40  # of a slider between two floats without a given step


class Playground:
    """Sliders, and below them the picture that ``draw`` makes for their values.

    >>> Playground(draw, temperature=(0.1, 2.0, 1.0), top_k=(0, 50, 0), model=["small", "large"])  # doctest: +SKIP

    In a notebook it is a widget, with the picture stored next to it, which is what GitHub and other readers without a
    kernel show. ``move`` sets sliders from code.

    Args:
        draw: called with the value of each control as a keyword argument; returns the picture.
        controls: (low, high, start) or (low, high, start, step), a slider of integers if all are integers; or a list
            of choices, the first of which is the start; numbers are offered in ascending order.

    Raises:
        ImportError: ipywidgets is missing.
        ValueError: no control, or a start outside its range. ``move`` raises it for a value outside the range.
    """

    def __init__(self, draw: Callable[..., Picture], **controls: tuple[float, ...] | list[Any]) -> None:
        if not controls:
            raise ValueError("a playground needs a control: Playground(draw, temperature=(0.1, 2.0, 1.0))")
        starts = {name: _start(name, control) for name, control in controls.items()}
        self._draw = draw
        self._controls = controls
        self._picture = draw(**starts)
        self._png = self._picture.png()
        self._widgets = ipywidgets()
        self.sliders = {name: self._control(name, control) for name, control in controls.items()}
        self._image = self._widgets.Image(value=self.png, format="png")
        # as large as in print, and in proportion; a narrow window makes it smaller
        self._image.layout = self._widgets.Layout(
            width=f"{self._picture.size_px['width']}px", max_width="100%", height="auto", align_self="flex-start"
        )
        self._panel = self._widgets.VBox(list(self.sliders.values()))
        self.widget = self._widgets.VBox([self._panel, self._image])
        for slider in self.sliders.values():
            slider.observe(self._show, names="value")

    @property
    def values(self) -> dict[str, Any]:
        """The sliders' values."""
        return {name: slider.value for name, slider in self.sliders.items()}

    @property
    def png(self) -> bytes:
        """The picture that the widget shows."""
        return self._png

    def move(self, **values: Any) -> None:
        """Set sliders from code; the picture follows."""
        for name, value in values.items():
            if name not in self._controls:
                raise ValueError(f"no control is named {name!r}; known: {', '.join(self._controls)}")
            _check(name, self._controls[name], value)
        for name, value in values.items():
            self.sliders[name].value = value

    def _control(self, name: str, control: tuple[float, ...] | list[Any]) -> Any:
        look = {
            "description": name.replace("_", " "),
            "layout": self._widgets.Layout(width="32em"),
            "style": {"description_width": "9em"},
        }
        if isinstance(control, list):
            is_ordered = all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in control)
            return self._widgets.Dropdown(options=sorted(control) if is_ordered else control, value=control[0], **look)
        low, high, start, *step = control
        if all(isinstance(number, int) for number in control):
            return self._widgets.IntSlider(start, low, high, *step, **look)
        return self._widgets.FloatSlider(start, min=low, max=high, step=_step(low, high, step), **look)

    def _show(self, change: dict[str, Any]) -> None:
        self._picture = self._draw(**self.values)
        self._png = self._picture.png()
        self._image.layout.width = f"{self._picture.size_px['width']}px"
        self._image.value = self.png

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        bundle: dict[str, Any] = self.widget._repr_mimebundle_(**options)
        # the widget's own text holds the bytes of the picture, which differ with every version of its fonts
        still = b64encode(self.png).decode("ascii")
        shown = {**bundle, "text/plain": self._in_words(), "image/png": still}
        return shown, {"image/png": self._picture.size_px}

    def _in_words(self) -> str:
        return "Playground: " + ", ".join(f"{name}={value}" for name, value in self.values.items())


def _start(name: str, control: tuple[float, ...] | list[Any]) -> Any:
    """The start of a control. Raises ValueError for a malformed one."""
    if isinstance(control, list) and control:
        return control[0]
    if isinstance(control, tuple) and len(control) in (3, 4):
        _check(name, control, control[2])
        return control[2]
    raise ValueError(f"{name}={control!r}: must be (low, high, start), (low, high, start, step) or a list")


def _check(name: str, control: tuple[float, ...] | list[Any], value: Any) -> None:
    if isinstance(control, list):
        if value not in control:
            raise ValueError(f"{name}={value!r}: must be one of {control}")
    elif not control[0] <= value <= control[1]:
        raise ValueError(f"{name}={value!r}: must be within [{control[0]}, {control[1]}]")


def _step(low: float, high: float, step: list[float]) -> float:
    return step[0] if step else (high - low) / NUM_STEPS


def ipywidgets() -> ModuleType:
    """The module. Raises ImportError, which names what to install, if it is missing."""
    try:
        import ipywidgets as module
    except ImportError:
        raise ModuleNotFoundError(
            "sliders need ipywidgets, which is not installed: pip install 'paged-infer[notebooks]'; "
            "the functions that draw (timeline_figure, pool_map_figure, your own) work without it",
            name="ipywidgets",
        ) from None
    return module
