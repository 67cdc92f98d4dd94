"""``bench simulate``: its report has the numbers and errors that it promises, and bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paged_infer.bench.report import JsonReport
from paged_infer.bench.simulation import cli, prediction
from paged_infer.bench.simulation.prediction import SimulateReport
from paged_infer.cli import app
from paged_infer.simulation.cards import Card


def run(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", "simulate", *options])
    return result.exit_code, result.output


@pytest.fixture
def workload(tmp_path) -> Path:
    path = tmp_path / "workload.json"
    path.write_text(json.dumps([{"at": 0.1 * i, "in": 100 + i, "out": 5 + i} for i in range(12)]))
    return path


def test_a_prediction_with_records_has_signed_errors(workload, tmp_path):
    records = write_records(tmp_path)
    code, output = run(
        "--gpu", "rtx-4090", "--gpu", "h100", "--workload", str(workload), "--records", str(records),
        "--step-overhead-ms", "2", "--watermark", "0", "--figures", str(tmp_path),
    )  # fmt: skip
    assert code == 0, output
    path = tmp_path / "bench-simulate.json"
    found = json.loads(path.read_text())
    for name in ("ttft", "tpot", "latency"):
        assert found[name].keys() == found["errors"][name].keys() == {"mean", "p50", "p90", "p99"}
    assert found["errors"]["ttft"]["mean"] == pytest.approx(found["ttft"]["mean"] / 1.0 - 1)
    assert found["errors"]["makespan"] == pytest.approx(found["makespan"] / 3.1 - 1)
    assert found["preemptions"] == 0 and 0 < found["pool_use"] < 1
    assert str(tmp_path) not in path.read_text()
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {one["gpu"] for one in found["loads"]} == {"rtx-4090", "h100"}
    report = SimulateReport.read(path)
    assert report.as_json() == JsonReport.as_json(report.prediction) | found  # what is stored is what is read
    for word in ("makespan, s", "measured", "1.5 ms more a step", "h100"):
        assert word in output


def test_clients_instead_of_arrivals(workload, tmp_path):
    code, output = run("--gpu", "l4", "--workload", str(workload), "--concurrency", "4", "--figures", str(tmp_path))
    assert code == 0, output
    loads = json.loads((tmp_path / "bench-simulate.json").read_text())["loads"]
    assert [one["load"] for one in loads] == [1, 2, 4, 8]
    assert loads[0]["tokens_per_s"] < loads[3]["tokens_per_s"]


def write_tables(folder: Path) -> str:
    """Their prefix; they end at 64 sequences and 50 tokens."""
    for kind, text in {
        "dense": "layer,tokens,time_us\nproduct,1,10\nproduct,50,20\n",
        "per_sequence": "layer,sequences,time_us\nlm_head,1,5\nlm_head,64,6\n",
        "attention": "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n0,0,8,256,9\n64,0,0,0,8\n64,512,0,0,9\n",
    }.items():
        (folder / f"card-{kind}.csv").write_text(text)
    return str(folder / "card")


def write_records(folder: Path) -> Path:
    """Of the requests of ``workload``: a second to the first token, and another to the last."""
    lines = [
        {"input_toks": 100 + i, "output_toks": 5 + i, "queued_ts": 50 + 0.1 * i, "first_token_ts": 51 + 0.1 * i,
         "last_token_ts": 52 + 0.1 * i}
        for i in range(12)
    ]  # fmt: skip
    path = folder / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_every_option_changes_what_is_predicted(workload, tmp_path, monkeypatch):
    """Each alone, on a pool that preempts. A new option fails here until it is among them."""
    monkeypatch.setattr(prediction, "LOADS", ())
    monkeypatch.setattr(prediction, "_assumptions", lambda *_: ())
    one_less = tmp_path / "one_less.json"
    one_less.write_text(json.dumps(json.loads(workload.read_text())[1:]))
    others = {
        "model": "qwen3-8b", "gpu": ["a10"], "workload": str(one_less), "rate": 500.0, "concurrency": 2,
        "num_blocks": 25, "max_num_seqs": 1, "policy": "static", "kv_cache_dtype": "int8", "quantization": "w4a16",
        "tensor_parallel_size": 2, "watermark": 0.5, "operator_tables": write_tables(tmp_path),
        "step_overhead_ms": 5.0, "share_of_bandwidth": 0.5, "share_of_peak": 0.2, "records": write_records(tmp_path),
    }  # fmt: skip
    assert [*others] == [*prediction.ServerOptions.__slots__]

    def predicted(**options) -> SimulateReport:
        options = {"workload": str(workload), "gpu": ["l4"], "num_blocks": 15, "watermark": 0.0, **options}
        return prediction.predict(prediction.ServerOptions(**options), cli.measure_cpu, lambda what: None)

    plain = predicted()
    assert plain.prediction.preemptions > 0 and plain.errors is None
    for name, value in others.items():
        other = predicted(**{name: value})
        assert other.errors if name == "records" else other.prediction.latency != plain.prediction.latency, name


def test_options_reach_the_cost_and_the_pool(workload):
    def predicted(**options) -> SimulateReport:
        options = {"workload": str(workload), "gpu": ["l4"], **options}
        return prediction.predict(prediction.ServerOptions(**options), cli.measure_cpu, lambda what: None)

    plain = predicted().prediction
    for options, faster in (
        ({"quantization": "w4a16"}, True),
        ({"kv_cache_dtype": "int8"}, True),
        ({"tensor_parallel_size": 2}, True),
        ({"share_of_bandwidth": 0.5}, False),
        ({"share_of_peak": 0.2}, False),
    ):
        other = predicted(**options).prediction
        assert (other.latency["mean"] < plain.latency["mean"]) == faster, options
        assert (other.num_blocks > plain.num_blocks) == faster, options
    assert predicted(num_blocks=15, watermark=0.0).prediction.preemptions > 0 == plain.preemptions
    assert predicted(policy="static", max_num_seqs=2).prediction.ttft["p99"] > plain.ttft["p99"]
    assert [one.load for one in predicted(rate=1000.0).loads] == pytest.approx([250, 500, 1000, 2000])


def test_a_cpu_is_measured(workload, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "measure_cpu", lambda: Card("cpu", 2**30, 30e9, 200e9, 200e9))
    code, output = run("--gpu", "cpu", "--model", "qwen3-30m", "--workload", str(workload), "--figures", str(tmp_path))
    assert code == 0, output
    found = json.loads((tmp_path / "bench-simulate.json").read_text())
    assert found["num_blocks"] == 256 * -(-(111 + 16) // 16)
    assert found["tpot"]["p50"] > 4 * 29e6 / 30e9  # float32 weights at the measured rate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "rtx-9090"], "error: gpu 'rtx-9090': not known; known: a10, a100, h100"),
        (["--model", "llama-9"], "error: model 'llama-9': no folder with a config.json, and no shape; known: qw"),
        (["--gpu", "l4", "--gpu", "l4"], "error: gpu 'l4': is given twice"),
        (["--rate", "0"], "error: rate=0: must be a number > 0"),
        (["--rate", "1e300"], "error: rate=1e+300: must be a number > 0"),
        (["--rate", "1e-300"], "error: rate=1e-300: the last of 12 requests would arrive after"),
        (["--rate", "1", "--concurrency", "2"], "error: rate=1 with concurrency=2"),
        (["--concurrency", "0"], "error: concurrency=0: must be at least 1"),
        (["--workload", "nothing.json"], "error: workload nothing.json"),
        (["--num-blocks", "4"], "error: request 0: a prompt of 100 tokens can never fit"),
        (["--num-blocks", "7"], "error: request 5: 1 sample(s)"),
        (["--policy", "fifo"], "error: scheduling_policy='fifo'"),
        (["--watermark", "1"], "error: watermark=1.0"),
        (["--quantization", "w3"], "error: quantization='w3': must be one of w8a16"),
        (["--kv-cache-dtype", "int3"], "error: kv_cache_dtype='int3'"),
        (["--tensor-parallel-size", "3"], "error: tensor_parallel=3"),
        (["--operator-tables", "none"], "error: operator tables none"),
        (["--operator-tables", "x", "--quantization", "w8a8"], "error: operator_tables with quantization"),
        (["--operator-tables", "x", "--gpu", "l4", "--gpu", "a10"], "error: operator_tables with 2 cards"),
        (["--records", "none.jsonl"], "error: records none.jsonl"),
        (["--records", "none.jsonl", "--rate", "2"], "error: records with rate=2"),
        (["--records", "none.jsonl", "--concurrency", "2"], "error: records with concurrency=2"),
        (["--num-blocks", "99999999999"], "error: num_blocks=99999999999: must be at least 1 and at most"),
        (["--max-num-seqs", "0"], "error: max_num_seqs=0"),
        (["--share-of-bandwidth", "nan"], "error: share_of_bandwidth=nan: must be > 0 and <= 1"),
        (["--share-of-peak", "1.1"], "error: share_of_peak=1.1: must be > 0 and <= 1"),
        (["--model", "llama-3.1-70b", "--gpu", "l4"], "error: llama-3.1-70b on 1 l4: 141.1 GB of weights"),
        (["--step-overhead-ms", "-1"], "error: step_overhead_s=-0.001"),
    ],
)
def test_bad_input_is_one_line(workload, options, message, tmp_path):
    given = [] if "--workload" in options else ["--workload", str(workload)]
    code, output = run(*given, *options, "--figures", str(tmp_path))
    assert code == 2 and output.startswith(message) and output.count("\n") == 1, output
    assert not (tmp_path / "bench-simulate.json").exists()


def test_extrapolation_is_reported(workload, tmp_path):
    tables = write_tables(tmp_path)
    code, output = run("--workload", str(workload), "--operator-tables", tables, "--figures", str(tmp_path))
    assert code == 0, output
    assert "note: tokens of a step beyond the tables, extrapolated" in output
    assert "note: tokens of a chunk beyond the tables, extrapolated" in output


def test_the_generated_workloads_are_seeded():
    like = prediction.ServerOptions(workload="alpaca-like", rate=5.0)
    assert like.requests() == like.requests() and len(like.requests()) == 300
