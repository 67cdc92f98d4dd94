"""Predictions for a GPU stand beside what it gave, and the table in the README is the one that was stored."""

from __future__ import annotations

import json
from pathlib import Path

import predictions as gpu_predictions
import pytest
from predictions import comparison, measured, read_predictions

from paged_infer.bench.kernels.comparisons import (
    BATCHES,
    CODED_DECODES,
    CODED_KINDS,
    CONTEXTS,
    LENGTHS,
    LINEAR_GRIDS,
    LINEAR_TOKENS,
)
from paged_infer.bench.kernels.peers import DECODE, PREFILL
from paged_infer.bench.kernels.report import Entry, KernelReport, Measurement
from paged_infer.bench.metrics import Metrics
from paged_infer.bench.roofline import Roofline
from paged_infer.bench.shapes import SHAPES
from paged_infer.bench.speed import measure as speed

ROOT = Path(__file__).resolve().parents[2]
PREDICTIONS = {one.what: one for one in read_predictions()}
DECODE_AT_32 = PREDICTIONS["decode, batch 32, context 4k"]
FLASH_AT_4K = PREDICTIONS["flash_attention, causal, 4k"]
OVER_SDPA = PREDICTIONS["flash_attention over SDPA flash, 4k"]


@pytest.fixture
def results(tmp_path) -> Path:
    """A folder as ``make gpu`` leaves it: half of 4 TB/s in decode, 350 TFLOP/s in flash, 1.75 times SDPA's."""
    work, sizes = 3.5e12, {"head_dim": 128, "length": 4096, "batch": 4}
    KernelReport(
        "cuda",
        {},
        roofline=Roofline(4e12, 4.2e12, 7e14),
        measurements=[
            Measurement("prefill", "", sizes, work, [Entry("flash_attention", 0.01), Entry("SDPA flash", 0.0175)]),
            Measurement("decode", "", {"batch": 32, "context": 4096}, 2e9, [Entry("paged_attention", 0.001)]),
        ],
    ).save(tmp_path / "bench-kernels.json")
    return tmp_path


def save_throughput(folder: Path, model: str) -> None:
    entry = speed.Entry(speed.ENGINE, Metrics(5.0, 25_000.0, mbu=0.71), [5.0])
    speed.SpeedReport("throughput", model, entries=[entry]).save(folder / "bench-throughput.json")


def test_a_measurement_is_below_within_or_above_what_was_predicted(results):
    assert measured(DECODE_AT_32.measure, results) == pytest.approx(0.5)
    assert measured(FLASH_AT_4K.measure, results) == pytest.approx(3.5e14)
    assert measured(OVER_SDPA.measure, results) == pytest.approx(1.75)
    table = comparison(results)
    (decode,) = (line for line in table.splitlines() if line.startswith(DECODE_AT_32.what))
    (flash,) = (line for line in table.splitlines() if line.startswith(FLASH_AT_4K.what))
    (over,) = (line for line in table.splitlines() if line.startswith(OVER_SDPA.what))
    assert decode.split()[-2:] == ["0.5", "below"]
    assert flash.split()[-3:] == ["350", "as", "predicted"]
    assert over.split()[-2:] == ["1.75", "above"]


def test_what_was_not_run_is_not_measured(results, tmp_path):
    assert measured(PREDICTIONS["decode, batch 1, context 32k"].measure, results) is None
    assert comparison(tmp_path / "nothing").count("not measured") == len(PREDICTIONS)


def test_another_models_throughput_is_not_compared(results):
    end_to_end = next(one for one in PREDICTIONS.values() if "metric" in one.measure)
    save_throughput(results, "storyteller")
    assert measured(end_to_end.measure, results) is None
    save_throughput(results, "qwen3-0.6b")
    assert measured(end_to_end.measure, results) == 0.71


def test_every_prediction_is_of_something_that_make_gpu_measures():
    for one in PREDICTIONS.values():
        assert 0 < one.low < one.high and one.why
        match one.measure:
            case {"group": "decode", "sizes": sizes, "kernel": kernel}:
                assert sizes["batch"] in BATCHES and sizes["context"] in CONTEXTS and kernel in DECODE
            case {"group": "prefill", "sizes": {"head_dim": 128, "length": length}, "kernel": kernel, "over": over}:
                assert length in LENGTHS and kernel in PREFILL and (over is None or over in PREFILL)
            case {"group": "decode_8_bits", "sizes": {"batch": batch, "context": context}, "over": "paged_attention"}:
                assert (batch, context) in CODED_DECODES and CODED_KINDS[0] == "int8"  # the first of these sizes
            case {"group": "linear", "sizes": {"tokens": tokens}, "over": "F.linear, bfloat16"}:
                assert tokens in LINEAR_TOKENS and LINEAR_GRIDS[0] == "w4a16"
            case {"metric": metric, "model": model}:
                assert metric in Metrics.__slots__ and model in SHAPES
            case {"rate": rate}:
                assert rate in Roofline.__slots__
            case other:
                raise AssertionError(other)


def test_targets_are_those_of_bench_kernels():
    """One number, in the report of ``bench kernels`` and here."""
    wanted = {reach.what: reach.wanted for reach in KernelReport("cuda", {}).reaches()}
    assert DECODE_AT_32.target == wanted["decode, batch 32, context 4k: share of copy"]
    assert PREDICTIONS["decode, batch 1, context 32k"].target == wanted["decode, batch 1, context 32k: share of copy"]
    for one in PREDICTIONS.values():
        if one.target is not None and "length" in one.measure.get("sizes", {}):
            name = f"paged / dense {one.measure['over']}" if one.measure["kernel"] == "paged_attention" else (
                f"flash_attention / {one.measure['over']}"
            )  # fmt: skip
            assert one.target == wanted[f"prefill 4k..16k: {name}"], one.what


def test_the_readme_shows_every_prediction_with_its_reasoning():
    readme = (ROOT / "paged_infer" / "kernels" / "README.md").read_text(encoding="utf-8")
    stored = json.loads(gpu_predictions.PREDICTIONS.read_text(encoding="utf-8"))
    assert stored["written"].split(",")[0] in readme
    for one in PREDICTIONS.values():
        target = "" if one.target is None else f"{one.target:g}"
        assert f"| {one.what} | {one.low:g} to {one.high:g} {one.unit} | {target} | {one.why} |" in readme, one.what
