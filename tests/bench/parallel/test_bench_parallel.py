"""bench parallel counts what ranks hand over, and keeps of two engines and of three routings what it measured."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from paged_infer import LLM, AsyncLLM
from paged_infer.bench.metrics import Percentiles
from paged_infer.bench.parallel import ranks
from paged_infer.bench.parallel.replicas import BEGINNINGS, OUTPUT, OWN, SHARED, measure_replicas, shared_beginnings
from paged_infer.bench.parallel.report import ParallelReport, RankReport, RoutingReport, parallel_figure, print_report
from paged_infer.bench.shapes import folder_of
from paged_infer.bench.workloads import random_ids
from paged_infer.config import EngineConfig

LAYERS, HIDDEN, VOCAB = 6, 192, 2048  # of qwen3-3m


@pytest.fixture
def report() -> ParallelReport:
    found = ParallelReport("a model", {}, 3, num_layers=LAYERS, sum_s=2e-4, num_replicas=2, per_s=5.0)
    found.ranks = [
        RankReport(n, {"1": 100.0 / n, "8": 400.0 / n}, 1e-3, 14 * (n - 1), 0, 10**7, [10**8]) for n in (1, 2)
    ]
    found.routings = {name: RoutingReport(300.0, Percentiles(0.1, 0.2, 0.3), 0.5) for name in ("round_robin", "prefix")}
    return found


def test_one_rank_of_two_takes_part_in_two_sums_per_layer_and_two_more_and_has_half_of_the_weights():
    with folder_of("qwen3-3m", "dummy") as folder:
        config = EngineConfig(load_format="dummy")
        calls, num_bytes, half = ranks.weigh_rank(Path(folder), 2, config)
        assert (calls, num_bytes) == (2 * LAYERS + 2, 4 * ((2 * LAYERS + 1) * HIDDEN + VOCAB // 2))
        none, no_bytes, whole = ranks.weigh_rank(Path(folder), 1, config)
        assert (none, no_bytes) == (0, 0) and 0.5 <= half / whole < 0.51


def test_at_the_break_even_link_two_ranks_gain_nothing_and_on_a_perfect_one_they_halve_the_time(report):
    assert report.gain(report.even_s) == pytest.approx(1)
    assert report.gain(0) == pytest.approx(2)


def test_it_is_stored_printed_and_drawn(report, tmp_path, capsys):
    report.save(tmp_path / "numbers.json")
    assert ParallelReport.read(tmp_path / "numbers.json") == report
    print_report(report)
    assert "ranks: 2; tokens/s 50 with 1, 200 with 8" in capsys.readouterr().out
    assert parallel_figure(report).png()
    report.ranks, report.routings = [], {}
    assert parallel_figure(report).png()  # one half alone may be measured


def test_engines_that_give_other_tokens_are_detected(report, monkeypatch):
    monkeypatch.setattr(ranks, "time_of_sum", lambda num_floats: 1e-4)
    options = {"dtype": "float32", "device": "cpu", "num_blocks": 64, "enable_prefix_caching": False}
    engines = {1: LLM(**options), 2: LLM(**options)}
    workloads = {"2": random_ids(1755, 2, 4, 8, seed=0)}
    report.repeats = 1
    for is_other in (False, True):
        if is_other:
            with torch.no_grad():
                engines[2].engine.decoder.final_norm.weight.neg_()
        report.ranks, report.has_same_tokens = [], True
        ranks.measure_ranks(report, engines, workloads, lambda name: None)
        assert report.has_same_tokens is not is_other
        assert all(one.tokens_per_s["2"] > 0 and one.step_s > 0 for one in report.ranks)


def test_requests_share_prefixes():
    prompts = shared_beginnings(1755, 40, seed=0).prompts
    assert len({tuple(prompt[:SHARED]) for prompt in prompts}) == BEGINNINGS
    assert len({tuple(prompt) for prompt in prompts}) == 40
    assert {len(prompt) for prompt in prompts} == {SHARED + OWN}


def test_each_routing_gets_its_throughput_its_first_tokens_and_its_hits(report):
    report.repeats, report.per_s, report.routings = 1, 0.0, {}
    longest = SHARED + OWN + OUTPUT

    async def measure() -> None:
        pools = {name: AsyncLLM(device="cpu", max_model_len=longest, num_blocks=128) for name in ("a", "b")}
        await measure_replicas(report, pools, 1755, 3, 0, lambda name: None)

    asyncio.run(measure())
    assert report.per_s > 0 and set(report.routings) == {"a", "b"}
    for found in report.routings.values():
        assert found.tokens_per_s > 0 and found.ttft_s.p50 > 0 and 0 <= found.hit_share < 1
