"""bench latency, throughput and load: the same requests for everybody, the same tokens, and numbers that agree."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from checkpoints import save_random_checkpoint
from typer.testing import CliRunner

from paged_infer import LLM, SamplingParams
from paged_infer.bench.peers.peers import open_peers
from paged_infer.bench.roofline import Roofline
from paged_infer.bench.speed.engine_runs import run_engine, watched_engine
from paged_infer.bench.speed.measure import Bench, SpeedReport
from paged_infer.bench.speed.optimisations import engine_options
from paged_infer.bench.workloads import Workload, nano_vllm_requests, one_request, random_lengths
from paged_infer.cli import app
from paged_infer.config import EngineConfig

ROOF = Roofline(1e9, 1e9, 1e10, "float32", "cpu")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = save_random_checkpoint("qwen3", tmp_path_factory.mktemp("speed"))
    return LLM(folder, num_blocks=64, max_num_seqs=8, device="cpu")


@pytest.fixture(scope="module")
def peers(llm):
    with open_peers(["generate", "static", "generate_batch"], llm, 0.3) as found:
        yield found


@pytest.fixture
def workload(llm) -> Workload:
    return random_lengths(llm, num_requests=4, shortest=3, longest=11, seed=1)


@pytest.fixture
def bench(llm) -> Bench:
    return Bench(llm, ROOF, repeats=2)


def test_the_throughput_workload_is_nano_vllms():
    """256 requests, 133,966 output tokens: what its bench.py prints of itself."""
    workload = nano_vllm_requests(vocab_size=151_936)
    assert sum(one.max_tokens for one in workload.params) == 133_966
    assert {one.temperature for one in workload.params} == {0.6}
    assert all(one.ignore_eos for one in workload.params)
    assert max(map(max, workload.prompts)) == 10_000


def test_a_scaled_workload_fits_a_small_vocabulary_and_scaled_lengths():
    workload = nano_vllm_requests(1003, num_requests=50, scale=0.01)
    assert max(map(max, workload.prompts)) < 1003
    assert {len(prompt) for prompt in workload.prompts} <= set(range(1, 11))
    assert {one.max_tokens for one in workload.params} <= set(range(1, 11))


def test_everybody_gives_the_same_tokens_and_as_many_as_were_asked_for(bench, llm, peers, workload):
    report = bench.throughput({"paged": watched_engine(llm), **peers}, workload)
    assert [entry.name for entry in report.entries] == ["paged", *peers]
    assert all(entry.same_counts and entry.same_tokens for entry in report.entries)
    assert report.is_right
    asked = sum(one.max_tokens for one in workload.params)
    for entry in report.entries:
        assert entry.metrics.output_tokens_per_s * entry.metrics.seconds == pytest.approx(asked)
        assert len(entry.runs_s) == 2
        assert entry.metrics.floor_share == pytest.approx(report.floor.seconds / entry.metrics.seconds)


def test_sampled_runs_are_held_to_their_counts_and_their_greedy_beginnings(bench, llm, peers):
    workload = nano_vllm_requests(1003, num_requests=3, scale=0.01)
    report = bench.throughput(
        {"paged": watched_engine(llm), "transformers static": peers["transformers static"]}, workload
    )
    assert report.is_right


@pytest.mark.parametrize("harm", ["swap", "drop"])
def test_a_contender_that_says_something_else_is_found_out(bench, llm, peers, workload, harm):
    def corrupted(asked):
        run = watched_engine(llm)(asked)
        if harm == "swap":
            run.token_ids[0][0] ^= 1
        else:
            run.token_ids[0].pop()
        return run

    report = bench.throughput({"paged": corrupted, "transformers": peers["transformers"]}, workload)
    assert report["paged"].same_counts is (harm == "swap")
    assert report["paged"].same_tokens is False
    assert report["transformers"].same_tokens and report["transformers"].same_counts
    assert not report.is_right


def test_latency_shows_the_first_run_apart_from_the_settled_ones(bench, llm, peers):
    order: list[str] = []

    def contender(name, run):
        return lambda workload: (order.append(name), run(workload))[1]

    contenders = {"paged": watched_engine(llm), "transformers": peers["transformers"]}
    contenders = {name: contender(name, run) for name, run in contenders.items()}
    report = bench.latency(contenders, one_request(1003, 5, 4, seed=0))
    assert order == ["paged", "transformers"] * 3  # one first run, two settled ones, interleaved
    assert report.is_right
    for entry in report.entries:
        assert entry.first.seconds not in entry.runs_s
        assert entry.same_tokens
        assert entry.metrics.ttft_s.p50 < entry.metrics.latency_s.p50 <= entry.metrics.seconds * 1.01


def test_a_closed_loop_never_has_more_requests_than_clients(llm, workload):
    run = run_engine(llm.engine, workload, num_clients=2)
    moments = sorted({one.arrived_s for one in run.times})
    for moment in moments:
        assert sum(one.arrived_s <= moment < one.token_s[-1] for one in run.times) <= 2
    assert len(moments) > 1


def test_an_open_loop_waits_for_nobody(llm, workload):
    run = run_engine(llm.engine, workload, arrive_s=[0.0, 0.001, 0.002, 0.003])
    assert [one.arrived_s for one in run.times] == pytest.approx([0.0, 0.001, 0.002, 0.003])
    assert all(one.token_s[0] > one.arrived_s for one in run.times)


def test_load_tells_closed_loops_from_arrivals_and_gives_every_token(bench, workload):
    report = bench.load(workload, clients=[1, 4], rates=None, rate_shares=[0.5])
    names = [entry.name for entry in report.entries]
    assert names[:2] == ["1 client", "4 clients"]
    served_per_s = len(workload.prompts) / report["4 clients"].metrics.seconds
    assert report.entries[2].load == pytest.approx(0.5 * served_per_s)
    assert report.is_right
    assert report["1 client"].metrics.floor_share is not None
    assert report.entries[2].metrics.floor_share is None  # it waits for arrivals: no floor of work


def test_the_engine_is_as_told_by_its_own_clock(llm, workload):
    run = run_engine(llm.engine, workload)
    assert [len(one.token_s) for one in run.times] == [one.max_tokens for one in workload.params]
    assert sum(run.span_s.values()) <= run.seconds * 1.01
    assert 0 < run.overhead_share < 1
    assert run.peak_kv_bytes > 0 and 0 < run.kv_fill <= 1
    llm.check_integrity()


def test_no_run_reads_the_prefixes_of_an_earlier_one(llm):
    workload = random_lengths(llm, num_requests=2, shortest=40, longest=40, seed=3)
    before = llm.stats()["prefix_hit_tokens"]
    for _ in range(2):
        run_engine(llm.engine, workload)
    assert llm.stats()["prefix_hit_tokens"] == before


def test_a_report_survives_its_json(bench, llm, workload, tmp_path):
    report = bench.latency({"paged": watched_engine(llm)}, one_request(1003, 4, 3, seed=0))
    report.save(tmp_path / "report.json")
    assert SpeedReport.read(tmp_path / "report.json") == report


SMALL = {
    "latency": ["--prompt-tokens", "4", "--max-tokens", "3"],
    "throughput": ["--num-requests", "2", "--scale", "0.01"],
    "load": ["--num-requests", "3", "--shortest", "2", "--longest", "4", "--clients", "2", "--rate", "50"],
}


@pytest.mark.parametrize("command", SMALL)
def test_each_command_prints_what_it_was_measured_on_and_leaves_numbers_and_a_picture(
    llm, tmp_path, command, monkeypatch
):
    monkeypatch.setattr("paged_infer.bench.roofline.measure", lambda device, dtype: ROOF)
    options = ["--model", str(llm.folder), "--repeats", "1", "--figures", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", command, *SMALL[command], *options])
    assert result.exit_code == 0, result.output
    assert "roofline: copy 1.0 GB/s" in result.output
    assert "load before" in result.output and "seed 0" in result.output
    report = SpeedReport.read(tmp_path / f"bench-{command}.json")
    assert report.command == command and report.entries
    assert (tmp_path / f"bench-{command}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "qwen3-8b"], ["qwen3-8b", "--load-format dummy"]),
        (["--load-format", "gguf"], ["load_format='gguf'", "auto, dummy"]),
        (["--peer", "nobody"], ["nobody", "known:", "generate_batch", "vllm"]),
        (["--peer", "nano-vllm"], ["nano-vllm", "'nanovllm'"]),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(arguments, words):
    result = CliRunner().invoke(app, ["bench", "throughput", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words)


def test_a_sample_of_a_workload_is_greedy_and_short(workload):
    warm = Workload("w", workload.prompts, [SamplingParams(temperature=0.7, max_tokens=9)] * 4, 0)
    sample = warm.sample(2, 5)
    assert [(one.temperature, one.max_tokens) for one in sample.params] == [(0, 5), (0, 5)]
    assert sample.prompts == workload.prompts[:2]


def test_optimisations_are_a_ladder_of_engines_that_say_the_same(tmp_path):
    small = ["--num-requests", "2", "--scale", "0.01", "--repeats", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, ["bench", "optimisations", *small, "--figures", str(tmp_path)])
    assert result.exit_code == 0, result.output
    report = SpeedReport.read(tmp_path / "bench-optimisations.json")
    expected = engine_options(torch.device("cpu"))
    assert [entry.name for entry in report.entries] == [*expected]
    assert all(entry.same_counts and entry.same_tokens for entry in report.entries)
    assert (tmp_path / "bench-optimisations.png").exists()
    first, *_, last = expected
    assert f"{last} / {first} = " in result.output and f"sdpa / {first} = " in result.output


def test_each_rung_has_one_optimisation_more_than_the_one_before():
    for device in ("cpu", "cuda"):
        options = [*engine_options(torch.device(device)).values()]
        for before, after in pairwise(options):
            assert before.keys() == after.keys()
            assert sum(before[name] != after[name] for name in before) == 1
        assert options[-1]["async_scheduling"] and not options[0]["async_scheduling"]
        EngineConfig(**options[-1])
