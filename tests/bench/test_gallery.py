"""The pictures of figures/ come from one command, and show what their names promise."""

from __future__ import annotations

from paged_infer.bench import gallery
from paged_infer.viz.pool_map import pool_cells
from paged_infer.viz.sequence_lives import sequence_lives


def test_the_gallery_is_two_small_pictures(tmp_path):
    paths = gallery.save_gallery(tmp_path / "figures")
    assert [path.name for path in paths] == ["timeline.png", "pool_map.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 120_000 for path in paths)


def test_the_crowd_is_chunked_preempted_and_swapped():
    trace = gallery.crowded_trace()
    states = {span.state for life in sequence_lives(trace) for span in life.spans}
    assert states == {"prefill", "decode", "waiting", "swapped"}
    assert any(life.preempted for life in sequence_lives(trace))


def test_those_that_begin_alike_share_blocks():
    trace = gallery.shared_trace()
    assert max(len(cell.owners) for cell in pool_cells(trace, 12)) == 8
    assert trace.steps[1].num_hit_tokens == 32
