"""The lessons of the simulator, on fewer requests than they print: each says what its docstring claims."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from paged_infer.bench.simulation import lessons

ROOT = Path(__file__).resolve().parents[3]


def numbers(lesson: lessons.Lesson) -> dict[str, list[float]]:
    """Name of a row -> its cells; a share of 11 % is 11."""
    assert all(len(row) == len(lesson.header) for row in lesson.rows)
    return {row[0]: [float(cell.replace(",", "").strip("%")) for cell in row[1:]] for row in lesson.rows}


def test_the_pool_decides_more_than_the_bandwidth():
    found = numbers(lessons.pool_and_watermark(60))
    slower, fewer, more = (
        found[name][1]
        for name in ("0.8 of the bandwidth instead of 0.9", "a quarter fewer blocks", "a quarter more blocks")
    )
    assert fewer > 2 * slower > 0 > more
    assert found["watermark 0.02 instead of 0"][3] < found["1.5 ms more a step"][3]  # preemptions


def test_a_small_error_of_a_step_is_a_large_one_of_a_queue():
    found = numbers(lessons.saturation(60))
    ttft = {name: cells[2] for name, cells in found.items()}
    assert max(ttft.values()) > 2 * ttft["10 a second"] and ttft["0.5 a second"] < 25
    assert found["10 a second"][1] <= 12


def test_small_chunks_shorten_stalls_and_delay_first_tokens():
    found = numbers(lessons.chunk_budget(40))
    longest = [cells[2] for cells in found.values()]
    assert longest == sorted(longest) and longest[-1] > 3 * longest[0]
    assert found["256 tokens a step"][3] > found["2048 tokens a step"][3]


def test_disaggregated_prefill_improves_the_tail_and_not_the_throughput():
    found = numbers(lessons.prefill_apart(40))
    together, apart = found["16 a second, two replicas"], found["16 a second, apart, nvlink-4"]
    assert apart[2] < 0.7 * together[2] and apart[4] < 1.1 * together[4]  # gap p99.9, tokens a second


def test_a_router_that_knows_prefixes_computes_fewer_of_them():
    found = numbers(lessons.routing(120))
    assert found["prefix-aware"][0] > found["least loaded"][0] + 10
    assert found["prefix-aware"][1] < found["round robin"][1]


def test_tensor_parallel_is_for_latency_and_a_fast_link():
    found = numbers(lessons.tensor_or_data_parallel(30))
    calm = {name: cells[0] for name, cells in found.items() if name.startswith("1 a second")}
    data, fast, slow = calm.values()
    assert fast < 0.8 * data and fast < slow


def test_few_bits_are_more_blocks():
    found = numbers(lessons.few_bits(60))
    plain, kv, weights, both = found.values()
    assert 1.9 * plain[0] < kv[0] < weights[0] < both[0]
    assert plain[1] > kv[1] == weights[1] == 0  # preemptions
    assert plain[4] < kv[4] < kv[2] and weights[4] < weights[2]  # the bytes alone, and with the blocks


def test_the_stored_prediction_is_the_simulators(monkeypatch):
    """The range in figures/gpu-predictions.json: what the lesson prints, rounded to thousands, from low to high."""
    both_ends = {name: lessons.H200_ASSUMPTIONS[name] for name in ("low", "high")}
    monkeypatch.setattr(lessons, "H200_ASSUMPTIONS", both_ends)
    found = {row[0]: float(row[5].replace(",", "")) for row in lessons.h200_throughput().rows}
    entries = json.loads((ROOT / "figures" / "gpu-predictions.json").read_text())["predictions"]
    (stored,) = (one for one in entries if one["what"].endswith("simulated"))
    assert (stored["low"], stored["high"]) == (round(found["low"], -3), round(found["high"], -3))


def test_lessons_are_chosen_by_name(monkeypatch):
    monkeypatch.setitem(lessons.LESSONS, "saturation", lambda: lessons.Lesson("few", ("", "x"), [("row", "1.5")]))
    app = lessons.typer.Typer()
    app.command()(lessons.main)
    result = CliRunner().invoke(app, ["saturation"])
    assert result.exit_code == 0 and "saturation: few" in result.output and "1.5" in result.output
    assert CliRunner().invoke(app, ["magic"]).exit_code == 2
