"""Explorers redraw when the slider moves, and carry a still picture for where no widget can run."""

from __future__ import annotations

import subprocess
import sys
from base64 import b64decode

import pytest
from holding import LIMIT_S
from watched import family, watch

from paged_infer import SamplingParams
from paged_infer.control.trace import Trace
from paged_infer.viz.explorer import StepExplorer, explore, explore_pool, explore_timeline
from paged_infer.viz.pool_map import pool_map_figure
from paged_infer.viz.timeline import timeline_figure

WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def trace() -> Trace:
    return watch(family(), num_blocks=16)[0]


@pytest.mark.parametrize("make", [explore, explore_timeline, explore_pool])
def test_a_moved_slider_changes_the_picture(trace, make):
    pytest.importorskip("ipywidgets")
    explorer = make(trace, 1)
    first = explorer.png
    explorer.slider.value = 4
    assert explorer.step == 4 and explorer.png != first
    assert explorer.widget.children[1].value == explorer.png
    explorer.step = 1
    assert explorer.slider.value == 1 and explorer.png == first


def test_each_shows_the_figures_of_its_step(trace):
    pytest.importorskip("ipywidgets")
    assert explore_pool(trace, 3).png == pool_map_figure(trace, 3).png()
    assert explore_timeline(trace, 3, by="time").png == timeline_figure(trace, by="time", cursor=3).png()


def test_it_begins_where_most_blocks_are_held_and_covers_every_step(trace):
    pytest.importorskip("ipywidgets")
    explorer = explore(trace)
    free = [step.num_free_blocks for step in trace.steps]
    assert explorer.step == free.index(min(free))
    assert (explorer.slider.min, explorer.slider.max) == (0, len(trace.steps) - 1)


def test_a_still_picture_stands_beside_the_widget(trace):
    pytest.importorskip("ipywidgets")
    explorer = explore(trace, 2)
    bundle, shown = explorer._repr_mimebundle_()
    assert bundle[WIDGET]["model_id"] == explorer.widget.model_id
    still = b64decode(bundle["image/png"])
    assert still == explorer.png and still.startswith(b"\x89PNG")
    assert shown["image/png"] == explorer._picture.size_px
    assert bundle["text/plain"] == f"{len(trace.steps)} steps to explore, at step 2"  # nbval compares this
    explorer.step = 3
    assert b64decode(explorer._repr_mimebundle_()[0]["image/png"]) != still


@pytest.mark.parametrize("step", [-1, 99])
def test_a_step_that_is_not_there_is_refused(trace, step):
    pytest.importorskip("ipywidgets")
    message = f"step={step}: the trace has steps 0 to {len(trace.steps) - 1}"
    with pytest.raises(ValueError, match=message):
        explore(trace, step)
    explorer = explore(trace)
    with pytest.raises(ValueError, match=message):
        explorer.step = step


def test_an_empty_trace_is_refused():
    for make in (explore, explore_timeline, explore_pool):
        with pytest.raises(ValueError, match="the trace has no steps yet: nothing to explore"):
            make(Trace(4))


def test_without_ipywidgets_one_error_says_what_to_install(trace, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r"ipywidgets.*pip install 'paged-infer\[notebooks\]'.*timeline_figure"):
        explore(trace)
    assert timeline_figure(trace).png()  # still pictures need no widgets


def test_ipywidgets_is_imported_by_nobody_who_does_not_explore():
    code = "import sys, paged_infer.viz.explorer; assert not {'ipywidgets', 'IPython'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT_S)


def test_nothing_is_printed(trace, capfd):
    pytest.importorskip("ipywidgets")
    explore(trace, 0).step = 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("draw", [timeline_figure, pool_map_figure, explore, explore_timeline, explore_pool])
def test_without_a_trace_the_error_says_how_to_record_one(draw):
    with pytest.raises(ValueError, match=r"^trace=None: .*LLM\(trace=True\)"):
        draw(None)


def test_any_picture_of_steps_can_be_explored():
    pytest.importorskip("ipywidgets")
    trace, _ = watch(family(), num_blocks=16)
    drawn = []
    explorer = StepExplorer(3, lambda step: drawn.append(step) or pool_map_figure(trace, step))
    explorer.step = 2
    assert drawn == [0, 2]


def test_the_trace_of_a_real_engine_is_explored(make_llm):
    pytest.importorskip("ipywidgets")
    llm = make_llm(trace=True, num_blocks=10, block_size=4, max_model_len=24, preemption_mode="swap")
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    llm.generate([[5, 6, 7, 8, 9 + i] for i in range(4)], params, use_tqdm=False)
    assert llm.trace.block_size == 4 and llm.stats()["preemptions"] > 0
    explorer = explore(llm.trace)
    explorer.step = 0
    assert explorer.png.startswith(b"\x89PNG")
