"""Pictures of a trace with a slider for the step; if no widget can run, the picture of one step."""

from __future__ import annotations

from collections.abc import Callable

from paged_infer.control.trace import Trace
from paged_infer.viz.playground import Playground
from paged_infer.viz.pool_map import WIDTH_IN, draw_pool_map, pool_map_figure, pool_map_height_in
from paged_infer.viz.sequence_lives import check_trace, sequence_lives
from paged_infer.viz.style import Picture, new_picture
from paged_infer.viz.timeline import draw_timeline, timeline_figure, timeline_height_in

PLAY_INTERVAL_MS = 400


class StepExplorer(Playground):
    """A slider with a play button, and the picture that ``draw`` makes for the step.

    In a notebook it is a widget, with the picture of its step stored next to it. Setting ``step`` moves the slider.

    Raises:
        ImportError: ipywidgets is missing.
        ValueError: there is no step, or none of that number.
    """

    def __init__(self, num_steps: int, draw: Callable[[int], Picture], step: int = 0) -> None:
        if num_steps < 1:
            raise ValueError("the trace has no steps yet: nothing to explore")
        self.num_steps = num_steps
        super().__init__(lambda step: draw(step), step=(0, num_steps - 1, self._checked(step)))
        self.slider = self.sliders["step"]
        play = self._widgets.Play(value=step, min=0, max=num_steps - 1, interval=PLAY_INTERVAL_MS)
        self._widgets.jslink((play, "value"), (self.slider, "value"))
        self._panel.children = [self._widgets.HBox([play, self.slider])]

    @property
    def step(self) -> int:
        return int(self.slider.value)

    @step.setter
    def step(self, step: int) -> None:
        self.slider.value = self._checked(step)

    def _checked(self, step: int) -> int:
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step={step}: the trace has steps 0 to {self.num_steps - 1}")
        return step

    def _in_words(self) -> str:
        return f"{self.num_steps} steps to explore, at step {self.step}"


def explore(trace: Trace, step: int | None = None) -> StepExplorer:
    """The timeline with a cursor, and below it the pool at that step. Names have the colours of the pool map.

    ``step``: where to begin. None: the first step with the most blocks held.
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
    """Only the timeline, with a cursor; for the arguments see ``explore`` and ``timeline_figure``."""
    check_trace(trace)
    start = _fullest(trace) if step is None else step
    return StepExplorer(len(trace.steps), lambda place: timeline_figure(trace, by=by, cursor=place), start)


def explore_pool(trace: Trace, step: int | None = None) -> StepExplorer:
    """Only the pool map; for the arguments see ``explore``."""
    check_trace(trace)
    start = _fullest(trace) if step is None else step
    return StepExplorer(len(trace.steps), lambda place: pool_map_figure(trace, place), start)


def _fullest(trace: Trace) -> int:
    return min(range(len(trace.steps)), key=lambda i: trace.steps[i].num_free_blocks, default=0)
