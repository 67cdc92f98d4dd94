"""The pictures of figures/ come from one command, and show what their names promise."""

from __future__ import annotations

import shutil
from pathlib import Path

from paged_infer.bench import gallery
from paged_infer.viz.pool_map import pool_cells
from paged_infer.viz.sequence_lives import sequence_lives

FIGURES = Path(__file__).parents[2] / "figures"


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


def test_pictures_are_drawn_again_from_the_numbers_beside_them(tmp_path):
    names = ["bench-arrival", "bench-latency", "ladder"]
    for name in names:
        shutil.copy(FIGURES / f"{name}.json", tmp_path)
    for name in [*names, "bench-memory", "page"]:  # two without numbers
        (tmp_path / f"{name}.png").touch()
    drawn = gallery.redraw(tmp_path)
    assert [path.stem for path in drawn] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert (tmp_path / "page.png").read_bytes() == b""


def test_each_stored_picture_that_has_numbers_can_be_drawn_from_them():
    named = [path.stem for path in FIGURES.glob("*.png") if path.with_suffix(".json").is_file()]
    unknown = [stem for stem in named if not any(stem.startswith(name) for name in gallery.DRAWN)]
    assert unknown == ["storyteller_loss"], "which its training draws"
