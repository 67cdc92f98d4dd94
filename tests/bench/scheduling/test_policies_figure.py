"""The pictures of policies and of an arrival show what their reports say."""

from __future__ import annotations

import pytest

from paged_infer.bench.scheduling.arrival import ArrivalReport, ArrivalRun
from paged_infer.bench.scheduling.policies import GAP_QUANTILES, Load, PoliciesReport, PolicyReport
from paged_infer.bench.scheduling.policies_figure import arrival_figure, policies_figure


def policy(name: str, stall_s: float, start_s: float) -> PolicyReport:
    gaps = [stall_s * (place + 1) / len(GAP_QUANTILES) for place in range(len(GAP_QUANTILES))]
    return PolicyReport(name, 64, 10.0, 0.5, 1.0, 0.1, 0.2, 0.3, start_s, stall_s, gaps, [0.1, 0.5, 1.0])


def policies() -> PoliciesReport:
    each = [policy("static", 0.02, 3.0), policy("prefill_first, delay 0", 2.0, 1.0), policy("chunked", 0.08, 0.08)]
    return PoliciesReport(Load(3, 1.0, (1, 2), (3, 4), 0), 8, "a model", {}, each)


def arrival() -> ArrivalReport:
    whole = ArrivalRun("whole prompt", 5000, 0.01, 0.6, 0.59, [(0.6, 0.6), (0.61, 0.01)])
    chunked = ArrivalRun("chunked", 64, 0.01, 0.05, 0.1, [(0.05, 0.05), (0.1, 0.05), (0.11, 0.01)])
    return ArrivalReport(8, 4096, "a model", {}, [whole, chunked])


def test_bars_are_as_long_as_the_waits():
    stalls = policies_figure(policies()).axes[0]
    assert [patch.get_width() for patch in stalls.patches] == pytest.approx([20, 2000, 80, 3000, 1000, 80])


def test_lines_end_at_the_longest_gap_and_the_last_first_token():
    _, gaps, firsts = policies_figure(policies()).axes
    assert [line.get_ydata()[-1] for line in gaps.lines] == pytest.approx([20, 2000, 80])
    assert {(line.get_xdata()[-1], line.get_ydata()[-1]) for line in firsts.lines} == {(1.0, 1.0)}


def test_each_policy_has_its_own_colour():
    gaps = policies_figure(policies()).axes[1]
    assert len({line.get_color() for line in gaps.lines}) == 3


def test_a_wait_is_drawn_from_one_token_to_the_next():
    (axes,) = arrival_figure(arrival()).axes
    whole = axes.lines[0]
    assert [*whole.get_xdata()][1:] == pytest.approx([0.0, 0.6, 0.61])
    assert [*whole.get_ydata()] == pytest.approx([10, 10, 600, 10])


@pytest.mark.parametrize("figure", [policies_figure(policies()), arrival_figure(arrival())])
def test_the_pictures_are_small_enough_for_a_notebook(figure):
    png = figure.png()
    assert png.startswith(b"\x89PNG")
    assert len(png) < 90_000
