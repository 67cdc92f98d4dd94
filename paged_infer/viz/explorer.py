"""Pictures of a trace with a slider for the step. Where no widget can run, the picture of one step stands there."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from types import ModuleType
from typing import Any

from paged_infer.control.trace import Trace
from paged_infer.viz.lives import sequence_lives
from paged_infer.viz.pool_map import WIDTH_IN, draw_pool_map, pool_map_figure, pool_map_height_in
from paged_infer.viz.style import Picture, new_picture
from paged_infer.viz.timeline import draw_timeline, timeline_figure, timeline_height_in

PLAY_INTERVAL_MS = 400


class StepExplorer:
    """A slider, and the picture that ``draw`` makes of the step that it stands at.

    In a notebook it is a widget, with the picture of the step it stands at stored beside it, which is what GitHub and
    other readers without a kernel show. Setting ``step`` moves the slider.

    Raises:
        ImportError: ipywidgets is missing.
        ValueError: there is no step, or none of that number.
    """

    def __init__(self, num_steps: int, draw: Callable[[int], Picture], step: int = 0) -> None:
        if num_steps < 1:
            raise ValueError("the trace has no steps yet: nothing to explore")
        self.num_steps = num_steps
        self._draw = draw
        self._picture = draw(self._checked(step))._repr_png_()
        widgets = _ipywidgets()
        wide = widgets.Layout(width="32em")
        self.slider = widgets.IntSlider(step, 0, num_steps - 1, description="step", layout=wide)
        play = widgets.Play(value=step, min=0, max=num_steps - 1, interval=PLAY_INTERVAL_MS)
        widgets.jslink((play, "value"), (self.slider, "value"))
        self._image = widgets.Image(value=self._picture, format="png")
        self._image.layout.max_width = "100%"
        self.widget = widgets.VBox([widgets.HBox([play, self.slider]), self._image])
        self.slider.observe(self._show, names="value")

    @property
    def step(self) -> int:
        return int(self.slider.value)

    @step.setter
    def step(self, step: int) -> None:
        self.slider.value = self._checked(step)

    @property
    def png(self) -> bytes:
        """The picture that is shown."""
        return self._picture

    def _checked(self, step: int) -> int:
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step={step}: the trace has steps 0 to {self.num_steps - 1}")
        return step

    def _show(self, change: dict[str, Any]) -> None:
        self._picture = self._draw(change["new"])._repr_png_()
        self._image.value = self._picture

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = self.widget._repr_mimebundle_(**options)
        # the widget's own text holds the bytes of the picture, which differ with every version of its fonts
        text = f"{self.num_steps} steps to explore, at step {self.step}"
        return {**bundle, "text/plain": text, "image/png": b64encode(self._picture).decode("ascii")}


def explore(trace: Trace, step: int | None = None) -> StepExplorer:
    """The timeline with a cursor, and below it the pool at that step; names carry their colours in the pool.

    ``step``: where to begin; None for the first step with most blocks held.
    """
    lives = sequence_lives(trace)
    heights = (timeline_height_in(len(lives)), pool_map_height_in(trace) + 0.1)

    def draw(place: int) -> Picture:
        picture = new_picture(WIDTH_IN, sum(heights))
        parts = picture.add_gridspec(2, 1, height_ratios=heights)
        draw_timeline(picture.add_subfigure(parts[0]), trace, lives, cursor=place, owners=True)
        draw_pool_map(picture.add_subfigure(parts[1]), trace, place)
        return picture

    return StepExplorer(len(trace.steps), draw, _fullest(trace) if step is None else step)


def explore_timeline(trace: Trace, step: int | None = None, *, by: str = "step") -> StepExplorer:
    """The timeline alone, with a cursor; arguments as ``explore`` and ``timeline_figure``."""
    start = _fullest(trace) if step is None else step
    return StepExplorer(len(trace.steps), lambda place: timeline_figure(trace, by=by, cursor=place), start)


def explore_pool(trace: Trace, step: int | None = None) -> StepExplorer:
    """The pool map alone; arguments as ``explore``."""
    start = _fullest(trace) if step is None else step
    return StepExplorer(len(trace.steps), lambda place: pool_map_figure(trace, place), start)


def _fullest(trace: Trace) -> int:
    return min(range(len(trace.steps)), key=lambda i: trace.steps[i].num_free_blocks, default=0)


def _ipywidgets() -> ModuleType:
    try:
        import ipywidgets
    except ImportError:
        raise ImportError(
            "explorers need ipywidgets, which is not installed: pip install 'paged-infer[notebooks]'; "
            "timeline_figure and pool_map_figure draw the same pictures without it"
        ) from None
    return ipywidgets
