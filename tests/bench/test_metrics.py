"""One set of metrics: by hand on a request whose tokens came at known times."""

from __future__ import annotations

import pytest

from paged_infer.bench.floor import Floor
from paged_infer.bench.metrics import Metrics, Percentiles, Run, TokenTimes
from paged_infer.engine.kv_usage import KVUsage

FLOOR = Floor(prefill_s=0.1, decode_s=0.3, memory_s=0.3, compute_s=0.2)


def run(seconds: float = 4.0) -> Run:
    times = [TokenTimes(1.0, 10, [1.5, 2.0, 3.5]), TokenTimes(1.0, 20, [2.0, 5.0])]
    usage = KVUsage()
    usage.record(32, 24)
    return Run([[1, 2, 3], [4, 5]], times, seconds, usage, kv_bytes_per_token=100)


def test_times_are_counted_from_the_arrival():
    one = run().times[0]
    assert (one.ttft_s, one.latency_s, one.tpot_s, one.gaps_s) == (0.5, 2.5, 1.0, [0.5, 1.5])


def test_a_request_of_one_token_has_no_time_per_further_token():
    one = TokenTimes(0.0, 4, [0.5])
    assert (one.tpot_s, one.gaps_s) == (None, [])


def test_whose_first_and_last_token_alone_are_known_has_no_gaps_but_a_mean():
    one = TokenTimes(0.0, 4, [1.0, 3.0], num_output=5)
    assert (one.tpot_s, one.gaps_s) == (0.5, [])


def test_metrics_by_hand():
    metrics = Metrics.of([run()], FLOOR)
    assert metrics.output_tokens_per_s == 5 / 4
    assert metrics.total_tokens_per_s == 35 / 4
    assert metrics.ttft_s == Percentiles(0.5, 1.0, 1.0)
    assert metrics.itl_s == Percentiles(1.5, 3.0, 3.0)
    assert (metrics.mbu, metrics.mfu, metrics.floor_share) == pytest.approx((0.075, 0.05, 0.1))
    assert (metrics.peak_kv_bytes, metrics.kv_fill) == (3200, 0.75)


def test_percentiles_are_values_that_were_measured():
    assert Percentiles.of(range(1, 101)) == Percentiles(50, 90, 99)
    assert Percentiles.of([]) is None


def test_what_a_peer_does_not_say_is_none_and_not_nought():
    silent = Run([[1, 2]], [TokenTimes(0.0, 3, [], num_output=2)], 1.0)
    metrics = Metrics.of([silent], None)
    assert metrics.output_tokens_per_s == 2
    unknown = (metrics.ttft_s, metrics.tpot_s, metrics.itl_s, metrics.latency_s, metrics.mbu, metrics.kv_fill)
    assert unknown == (None,) * 6
    assert metrics.peak_kv_bytes is None


def test_the_median_of_runs_is_taken_field_by_field():
    several = [run(seconds) for seconds in (1.0, 2.0, 9.0)]
    middle = Metrics.of(several, FLOOR)
    assert middle.seconds == 2.0
    assert middle.output_tokens_per_s == 2.5
    assert middle.ttft_s == Metrics.of(several[:1], FLOOR).ttft_s
    assert middle.overhead_share is None


def test_rates_agree_with_the_median_seconds_of_an_even_number_of_runs():
    middle = Metrics.of([run(seconds) for seconds in (1.0, 9.0)], FLOOR)
    assert middle.seconds == 5.0
    assert middle.output_tokens_per_s == pytest.approx(5 / 5.0)
    assert middle.floor_share == pytest.approx(FLOOR.seconds / 5.0)
