"""The traffic picture is drawn from counts, and the counts lie where theory says."""

from __future__ import annotations

import json
import math

import pytest

from paged_infer.bench.kernels import attention_traffic
from paged_infer.bench.kernels.attention_traffic import (
    STANDARD_COLOUR,
    TrafficReport,
    attention_traffic_figure,
    count_traffic,
    save_attention_traffic,
)

N, D = 64, 8


@pytest.fixture(scope="module")
def report() -> TrafficReport:
    return count_traffic(
        head_dim=D, lengths=(16, 32, N), fast_sizes=(128, 512), fixed_length=N, fast_sweep=(128, 512, 4096)
    )


def dots(axes):
    """Every marked point, as {(x, y)}."""
    marked = [line for line in axes.lines if line.get_marker() == "o"]
    return {(x, y) for line in marked for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}


def test_dots_are_the_counts(report):
    by_length, by_memory = attention_traffic_figure(report).axes
    assert dots(by_length) == {(count.num_tokens, count.num_moved) for count in report.by_length}
    tiled = {(c.fast_elements, c.num_moved) for c in report.by_memory if c.fast_elements}
    assert dots(by_memory) == tiled


def test_counts_are_what_the_algorithms_move(report):
    for count in report.by_length + report.by_memory:
        n = count.num_tokens
        blocks = None if count.block_q is None else math.ceil(n / count.block_q)
        expected = 4 * n * n + 4 * n * D if blocks is None else 2 * n * D + 2 * n * D * blocks
        assert count.num_moved == expected


def test_every_run_counted_is_the_same_attention(report):
    assert 0 < report.largest_difference < 1e-5


def test_theory_is_met_by_the_standard_algorithm_and_approached_by_tiles_from_above(report):
    by_length, _ = attention_traffic_figure(report).axes
    theory = [line for line in by_length.lines if line.get_marker() == "None"]
    counted = [line for line in by_length.lines if line.get_marker() == "o"]
    assert [line.get_color() for line in theory] == [line.get_color() for line in counted]
    for band, line in zip(theory, counted, strict=True):
        ratios = [c / t for c, t in zip(line.get_ydata(), band.get_ydata(), strict=True)]
        if line.get_color() == STANDARD_COLOUR:
            assert ratios == [1.0, 1.0, 1.0]
        else:
            assert ratios == sorted(ratios, reverse=True)
            assert all(ratio > 1 for ratio in ratios)


def test_picture_and_numbers_lie_side_by_side(report, tmp_path, monkeypatch):
    monkeypatch.setattr(attention_traffic, "count_traffic", lambda: report)
    picture = save_attention_traffic(tmp_path / "figures")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(picture.read_bytes()) < 250_000
    assert TrafficReport.read(picture.with_suffix(".json")) == report
    first = json.loads(picture.with_suffix(".json").read_text())["by_length"][0]
    assert first == {
        "num_tokens": 16,
        "fast_elements": None,
        "block_q": None,
        "num_read": 3 * 16 * D + 2 * 16 * 16,
        "num_written": 16 * D + 2 * 16 * 16,
    }
