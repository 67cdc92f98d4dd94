"""The pool map shows every block as it was: who held it, how full, how often, findable or free."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_rgba
from watched import boxes, colours, crowd, family, uneven, watch

from paged_infer.control.trace import Trace
from paged_infer.viz.pool_map import GAP, Cell, Grid, pool_cells, pool_map_figure
from paged_infer.viz.sequence_lives import owner_colour

RUNS = {
    "family": (family, {}),
    "swapping": (lambda: crowd(11, 9, 7, 3, max_tokens=9), {"num_blocks": 9, "num_swap_blocks": 9, "budget": 12}),
    "static": (uneven, {"max_num_seqs": 2, "policy": "static", "num_blocks": 24}),
    "failing": (family, {"fails": [0, 3, 5], "num_blocks": 24}),
}
INSIDE = 1 - 2 * GAP


@pytest.fixture(params=RUNS)
def run(request):
    requests, options = RUNS[request.param]
    return watch(requests(), **options)


def place_of(box, columns):
    left, low, right, high = box
    return int((low + high) / 2) * columns + int((left + right) / 2)


def test_cells_are_what_an_onlooker_saw(run):
    trace, seen = run
    for place, step in enumerate(seen):
        cells = pool_cells(trace, place)
        assert [cell.block for cell in cells] == list(range(trace.num_blocks))
        assert [len(cell.owners) for cell in cells] == step.counts
        assert {cell.block for cell in cells if cell.is_hashed} == step.findable
        for cell in cells:
            assert cell.owners == tuple(i for i, table in step.tables.items() if cell.block in table)
            stored = [
                step.computed[i] + step.scheduled.get(i, 0) - 4 * step.tables[i].index(cell.block) for i in cell.owners
            ]
            if stored:
                assert cell.num_tokens == min(4, max(0, *stored))
            state = "held" if stored else "cached" if cell.block in step.findable else "free"
            assert cell.state == state


def test_every_cell_is_drawn_once_as_what_it_is(run):
    trace, _ = run
    for place in range(len(trace.steps)):
        cells = pool_cells(trace, place)
        axes = pool_map_figure(trace, place).axes[0]
        columns = round(axes.get_xlim()[1])
        for state in ("cached", "free"):
            drawn = [place_of(box, columns) for box in boxes(axes, state)]
            assert sorted(drawn) == [cell.block for cell in cells if cell.state == state]
        shared = [place_of(box, columns) for box in boxes(axes, "shared")]
        assert sorted(shared) == [cell.block for cell in cells if len(cell.owners) > 1]
        corners = [place_of(box, columns) for box in boxes(axes, "findable")]
        assert sorted(corners) == [c.block for c in cells if c.owners and c.is_hashed]


def test_bands_have_their_owners_colours_and_are_as_long_as_the_block_is_full(run):
    trace, _ = run
    for place in range(len(trace.steps)):
        axes = pool_map_figure(trace, place).axes[0]
        columns = round(axes.get_xlim()[1])
        held = [cell for cell in pool_cells(trace, place) if cell.owners]
        filled = boxes(axes, "tokens")
        wanted = [(cell, owner) for cell in held for owner in cell.owners[:4] if cell.num_tokens]
        assert len(filled) == len(wanted)
        for box, colour, (cell, owner) in zip(filled, colours(axes, "tokens") if filled else [], wanted, strict=True):
            assert place_of(box, columns) == cell.block
            assert colour == to_rgba(owner_colour(owner))
            assert box[2] - box[0] == pytest.approx(INSIDE * cell.num_tokens / 4, abs=1e-5)
            assert box[3] - box[1] == pytest.approx(INSIDE / min(4, len(cell.owners)), abs=1e-5)
        empty = sum(box[2] - box[0] for box in boxes(axes, "empty"))
        slots = sum((4 - cell.num_tokens) * min(4, len(cell.owners)) for cell in held)
        assert empty == pytest.approx(INSIDE * slots / 4, abs=1e-4)


def test_words_say_who_holds_a_block_and_how_often():
    trace, _ = watch(family(), num_blocks=16)
    figure = pool_map_figure(trace, 3)
    cells, names = pool_cells(trace, 3), ("a", "b.0", "b.1", "c")
    assert {len(cell.owners) for cell in cells} == {0, 1, 2, 4}
    words: dict[int, list[str]] = {}
    for text in figure.axes[0].texts:
        x, y = text.get_position()
        words.setdefault(place_of((x, y, x, y), 8), []).append(text.get_text())
    expected = {}
    for cell in cells:
        partly = f"   {cell.num_tokens}/4" * (cell.num_tokens < 4)
        if len(cell.owners) == 1:
            expected[cell.block] = [names[cell.owners[0]] + partly]
        elif len(cell.owners) == 2:
            expected[cell.block] = ["×2", *(names[owner] for owner in cell.owners)]
        elif cell.owners:
            expected[cell.block] = ["×4"]  # no room for four names
    assert words == expected
    title = figure.legends[0].get_title().get_text()
    held = sum(bool(cell.owners) for cell in cells)
    assert title.startswith(f"step 3: {held} of 16 blocks held by 4 sequences, ")
    share = sum(c.num_tokens for c in cells if c.owners) / (4 * held)
    assert f"{share:.0%} of their slots filled" in title and f"{sum(len(c.owners) > 1 for c in cells)} shared" in title


def test_swapped_sequences_are_counted_in_the_title():
    requests, options = RUNS["swapping"]
    trace, _ = watch(requests(), **options)
    place = next(i for i, step in enumerate(trace.steps) if step.num_swapped)
    title = pool_map_figure(trace, place).legends[0].get_title().get_text()
    assert title.endswith(f"; {trace.steps[place].num_swapped} swapped out")


def test_steps_count_from_the_end_too():
    trace, _ = watch(family(), num_blocks=16)
    last = len(trace.steps) - 1
    assert pool_cells(trace, -1) == pool_cells(trace, last)
    assert pool_map_figure(trace).legends[0].get_title().get_text().startswith(f"step {last}: ")
    with pytest.raises(IndexError):
        pool_map_figure(trace, last + 1)


def test_all_steps_have_pictures_of_one_size_and_key():
    trace, _ = watch(family(), num_blocks=16)
    figures = [pool_map_figure(trace, place) for place in range(len(trace.steps))]
    assert len({tuple(figure.get_size_inches()) for figure in figures}) == 1
    assert len({tuple(t.get_text() for t in figure.legends[0].get_texts()) for figure in figures}) == 1


@pytest.mark.parametrize("num_blocks", [1, 8, 20, 64, 150, 256, 1000, 30_000])
def test_any_pool_fits(num_blocks):
    grid = Grid.of(num_blocks)
    assert grid.columns * grid.rows >= num_blocks > grid.columns * (grid.rows - 1)
    assert grid.columns * grid.cell_in[0] <= 6.81 and grid.height_in <= 2.41


def test_a_thousand_blocks_in_use_are_all_there_in_a_small_file():
    trace, _ = watch(crowd(*[120] * 32, max_tokens=3), num_blocks=1000, max_num_seqs=64, budget=4096)
    figure = pool_map_figure(trace, 0)
    axes = figure.axes[0]
    held = sum(bool(cell.owners) for cell in pool_cells(trace, 0))
    assert held == 32 * 30 and len(boxes(axes, "tokens")) == held and len(boxes(axes, "free")) == 40
    assert len(figure.png()) < 150_000


def test_the_end_of_a_large_pool_is_left_out_where_no_step_uses_it():
    trace, _ = watch(crowd(9, 9), num_blocks=5000)
    axes = pool_map_figure(trace, 2).axes[0]
    assert len(boxes(axes, "tokens")) + len(boxes(axes, "free")) + len(boxes(axes, "cached")) == 256
    assert axes.get_xlabel() == "blocks 256 to 4,999 are never used in this trace, and not drawn"
    assert "of 5,000 blocks" in axes.figure.legends[0].get_title().get_text()


def test_nothing_is_printed_and_files_are_small(capfd, tmp_path):
    trace, _ = watch(family(), num_blocks=16)
    pool_map_figure(trace, 3).save(tmp_path / "pool.png")
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "pool.png").stat().st_size < 60_000


def test_an_empty_trace_is_refused():
    with pytest.raises(ValueError, match="the trace has no steps yet"):
        pool_map_figure(Trace(4))


def test_a_cell_says_what_it_is():
    assert [Cell(0, owners, 0, findable).state for owners, findable in (((1,), True), ((), True), ((), False))] == [
        "held",
        "cached",
        "free",
    ]
