"""The timeline shows what everybody did in every step, as an onlooker saw it."""

from __future__ import annotations

import sys

import pytest
from matplotlib.colors import to_rgba
from watched import boxes, colours, crowd, family, texts, uneven, watch

from paged_infer.control.trace import Trace
from paged_infer.viz.sequence_lives import OWNER_COLOURS, owner_colour, sequence_lives, sequence_names
from paged_infer.viz.style import DPI, SHARPNESS
from paged_infer.viz.timeline import LOOKS, draw_timeline, timeline_figure

TIGHT = {"num_blocks": 9, "block_size": 4, "budget": 12}
RUNS = {
    "recompute": (lambda: crowd(11, 9, 7, 3, max_tokens=9), TIGHT),
    "swap": (lambda: crowd(11, 9, 7, 3, max_tokens=9), {**TIGHT, "num_swap_blocks": 9}),
    "static": (uneven, {"max_num_seqs": 2, "policy": "static"}),
    "prefill first": (lambda: [*crowd(5, 9), (3, crowd(2, 2, 8)[2][1])], {"policy": "prefill_first"}),
    "family": (family, {}),
    "failing": (family, {"fails": [0, 3, 5]}),
}


@pytest.fixture(params=RUNS)
def run(request):
    requests, options = RUNS[request.param]
    return watch(requests(), **options)


def test_the_runs_below_show_every_state():
    shown = set()
    for requests, options in RUNS.values():
        trace, _ = watch(requests(), **options)
        shown |= {span.state for life in sequence_lives(trace) for span in life.spans}
    assert shown == set(LOOKS)


def as_seen(place, step, seen, furthest, sequence_id, failed):
    """The state's name, told from the live scheduler."""
    queue = step.queues[sequence_id]
    if queue != "running":
        return queue
    if sequence_id not in step.scheduled:
        came = place == 0 or seen[place - 1].queues.get(sequence_id) != "running"
        return "prefill" if came else "stalled"
    if failed:
        return "failed"
    if step.computed[sequence_id] < furthest[sequence_id]:
        return "recompute"
    decodes = (
        step.known[sequence_id] - step.computed[sequence_id] == 1
        and step.known[sequence_id] > seen[0].known[sequence_id]
    )
    return "decode" if decodes else "prefill"


def test_states_are_what_an_onlooker_saw(run):
    trace, seen = run
    lives = {life.sequence_id: life for life in sequence_lives(trace)}
    furthest = dict.fromkeys(lives, 0)
    for place, step in enumerate(seen):
        failed = trace.steps[place].ended_s is None
        for sequence_id, life in lives.items():
            expected = None
            if sequence_id in step.queues:
                expected = as_seen(place, step, seen, furthest, sequence_id, failed)
            assert life.state_at(place) == expected, (place, sequence_id)
            if not failed and sequence_id in step.scheduled:
                done = step.computed[sequence_id] + step.scheduled[sequence_id]
                furthest[sequence_id] = max(furthest[sequence_id], done)


def test_every_span_is_a_bar_in_the_colour_of_its_state(run):
    trace, _ = run
    lives = sequence_lives(trace)
    rows = timeline_figure(trace).axes[0]
    for state, look in LOOKS.items():
        spans = {
            (span.first - 0.5, row, span.last + 0.5)
            for row, life in enumerate(lives)
            for span in life.spans
            if span.state == state
        }
        drawn = boxes(rows, state)
        assert {(left, (low + high) / 2, right) for left, low, right, high in drawn} == spans
        assert len(drawn) == len(spans)
        if spans:
            assert colours(rows, state) == [to_rgba(look.face)]
            assert all(high - low == pytest.approx(look.height) for _, low, _, high in drawn)


def test_the_strip_below_adds_up_to_the_tokens_of_each_step(run):
    trace, _ = run
    strip = timeline_figure(trace).axes[1]
    heights = [0.0] * len(trace.steps)
    for state in LOOKS:
        for left, low, _, high in boxes(strip, state):
            heights[int(left + 0.5)] += high - low
    assert heights == [step.num_tokens for step in trace.steps]


@pytest.mark.parametrize("name", ["recompute", "swap"])
def test_preemptions_are_marked_where_they_happen_and_what_they_cost_is_seen(name):
    requests, options = RUNS[name]
    trace, _ = watch(requests(), **options)
    figure = timeline_figure(trace)
    (marks,) = [line for line in figure.axes[0].lines if line.get_gid() == "preempted"]
    happened = {(place - 0.5, i) for place, step in enumerate(trace.steps) for i in step.preempted}
    assert set(zip(marks.get_xdata(), marks.get_ydata(), strict=True)) == happened and happened
    key = [text.get_text() for text in figure.legends[0].get_texts()]
    assert ("computed again" in key) == (name == "recompute")
    assert ("swapped out" in key) == (name == "swap")
    assert "preempted" in key and "has ended, keeps its blocks" not in key


def test_numbers_say_what_was_computed_and_what_was_found():
    trace, _ = watch(family())
    # 8 of 11 are full blocks; the second sample begins with all of its sibling's prompt
    assert texts(timeline_figure(trace).axes[0]) == ["11", "4+8", "0+12", "4+8"]
    assert "16 of 35 tokens to prefill found" in timeline_figure(trace).legends[0].get_title().get_text()


def test_a_number_without_room_stands_where_decoding_begins():
    trace, _ = watch(crowd(40, 3, max_tokens=120), budget=16)
    assert texts(timeline_figure(trace).axes[0])[0] == "40"  # computed in three chunks


def test_samples_of_one_request_are_told_apart_and_long_names_are_cut():
    trace, _ = watch(family())
    assert sequence_names(trace) == {0: "a", 1: "b.0", 2: "b.1", 3: "c"}
    (arrival,) = crowd(3)
    arrival[1].request_id = arrival[1].sequences[0].request_id = "cmpl-0123456789abcdef"
    assert sequence_names(watch([arrival])[0]) == {0: "…789abcdef"}


def test_a_cursor_covers_its_step_on_both_panels():
    trace, _ = watch(family())
    for axes in timeline_figure(trace, cursor=4).axes:
        (cursor,) = [patch for patch in axes.patches if patch.get_gid() == "cursor"]
        assert (cursor.get_x(), cursor.get_width()) == (3.5, 1.0)
    assert "step 4" in texts(timeline_figure(trace, cursor=4).axes[0])


def test_time_makes_steps_as_wide_as_they_were():
    trace, _ = watch(family())
    rows, strip = timeline_figure(trace, by="time").axes
    assert strip.get_xlabel() == "seconds"
    assert rows.get_xlim() == (0, len(trace.steps) - 1 + 0.25)
    assert (0.0, 1.0) in [(left, right) for left, _, right, _ in boxes(rows, "prefill")]
    with pytest.raises(ValueError, match=r"by='date': must be step or time"):
        timeline_figure(trace, by="date")


def test_names_can_carry_the_colours_of_the_pool_map():
    trace, _ = watch(family())
    figure = timeline_figure(trace)
    figure.clear()
    draw_timeline(figure, trace, sequence_lives(trace), owners=True)
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_bbox_patch().get_facecolor() for label in labels] == [to_rgba(owner_colour(i)) for i in range(4)]
    assert len(set(OWNER_COLOURS)) == len(OWNER_COLOURS)


def test_sixty_sequences_and_five_hundred_steps_stay_readable():
    requests = [(8 * i, one) for i, (_, one) in enumerate(crowd(*range(3, 63), max_tokens=90))]
    trace, _ = watch(requests, num_blocks=150, max_num_seqs=16, num_swap_blocks=40)
    assert len(trace.steps) > 450
    figure = timeline_figure(trace)
    png = figure.png()
    assert png.startswith(b"\x89PNG") and len(png) < 60_000
    rows = figure.axes[0]
    pixels = rows.get_window_extent().height / (rows.get_ylim()[0] - rows.get_ylim()[1])
    assert pixels >= 7
    px = rows.get_window_extent().width / (rows.get_xlim()[1] - rows.get_xlim()[0])
    assert min((right - left) * px for left, _, right, _ in boxes(rows, "prefill")) > 2  # seen, though a step is less
    names = [label for label in rows.get_yticklabels() if label.get_text()]
    assert pixels * 60 / len(names) >= 10


def test_nothing_is_printed_and_no_window_is_needed(capfd, tmp_path):
    trace, _ = watch(family())
    timeline_figure(trace).save(tmp_path / "timeline.png")
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "timeline.png").stat().st_size < 60_000
    width = int.from_bytes((tmp_path / "timeline.png").read_bytes()[16:20], "big")
    assert width == int(7.4 * DPI * SHARPNESS)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_an_empty_trace_is_refused():
    with pytest.raises(ValueError, match="the trace has no steps yet"):
        timeline_figure(Trace(4))
