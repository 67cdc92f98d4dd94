"""The ladder says "same tokens" only where it is true, and its costs are what was held."""

from __future__ import annotations

from dataclasses import replace

import pytest
from checkpoints import save_random_checkpoint
from typer.testing import CliRunner

from paged_infer import LLM
from paged_infer.bench.peers.transformers_peers import transformers_baselines
from paged_infer.bench.speed.baselines import our_baselines
from paged_infer.bench.speed.ladder import Ladder, run_ladder
from paged_infer.bench.workloads import random_lengths, story_beginnings
from paged_infer.cli import app


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(save_random_checkpoint("qwen3", tmp_path_factory.mktemp("bench")), num_blocks=64)


@pytest.fixture(scope="module")
def rungs(llm):
    return {**our_baselines(llm), **transformers_baselines(llm)}


@pytest.fixture(scope="module")
def workload(llm):
    return random_lengths(llm, num_requests=4, shortest=3, longest=11, seed=1)


def test_every_rung_gives_the_tokens_of_transformers(llm, rungs, workload):
    report = run_ladder(llm, rungs, workload, warm_up=False)
    assert [rung.name for rung in report.entries if not rung.same_tokens] == []
    assert report.num_output_tokens == sum(params.max_tokens for params in workload.params)


def test_a_corrupted_rung_is_found_out(llm, rungs, workload):
    def corrupted(workload):
        result = rungs["paged"](workload)
        result.token_ids[-1][-1] ^= 1
        return result

    report = run_ladder(llm, {**rungs, "paged": corrupted}, workload, warm_up=False)
    assert [rung.name for rung in report.entries if not rung.same_tokens] == ["paged"]


def test_compare_says_no_and_fails_when_a_decoder_weight_is_wrong(llm, tmp_path, monkeypatch):
    broken = LLM(llm.folder, num_blocks=64)
    broken.engine.decoder.layers[1].mlp_norm.weight.neg_()
    monkeypatch.setattr("paged_infer.cli.compare.open_llm", lambda model, **options: broken)
    result = CliRunner().invoke(app, ["compare", "--num-prompts", "2", "--max-tokens", "6", "--figures", str(tmp_path)])
    assert result.exit_code == 1
    report = Ladder.read(tmp_path / "ladder.json")
    assert {rung.name: rung.same_tokens for rung in report.entries} == {
        "naive": False,
        "cached": False,
        "static": False,
        "paged": False,
        "transformers": True,
        "transformers static": True,
    }
    assert "NO" in result.output.split()


def test_compare_writes_a_picture_and_its_numbers(llm, tmp_path):
    arguments = ["compare", str(llm.folder), "--num-prompts", "3", "--max-tokens", "5", "--figures", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    said = "6 systems on 3 prompts, one system after another: may take "
    assert result.stderr.startswith(said), "how long, before it begins"
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    assert all(rung.same_tokens for rung in Ladder.read(tmp_path / "ladder.json").entries)


def test_kv_memory_is_counted_where_it_is_held(llm, rungs, workload):
    report = run_ladder(llm, rungs, workload, warm_up=False)
    per_token = llm.engine.memory.kv_bytes_per_token
    assert report["naive"].metrics.peak_kv_bytes == 0
    assert report["naive"].metrics.kv_fill is None
    assert report["cached"].metrics.peak_kv_bytes == llm.engine.memory.max_model_len * per_token
    assert report["static"].metrics.peak_kv_bytes == 4 * report["cached"].metrics.peak_kv_bytes
    # Alone, transformers' cache grows with the sequence: at the last step all but the newest token are in it.
    longest = max(len(p) + s.max_tokens for p, s in zip(workload.prompts, workload.params, strict=True))
    assert report["transformers"].metrics.peak_kv_bytes == (longest - 1) * per_token
    assert report["transformers"].metrics.kv_fill == 1
    assert 0 < report["static"].metrics.kv_fill < report["paged"].metrics.kv_fill <= 1


def test_a_report_survives_its_json(llm, rungs, workload, tmp_path):
    report = run_ladder(llm, {name: rungs[name] for name in ("paged", "transformers")}, workload, warm_up=False)
    report.save(tmp_path / "report.json")
    again = Ladder.read(tmp_path / "report.json")
    assert (again.model, again.workload, again.machine) == (report.model, report.workload, report.machine)
    assert again.num_output_tokens == report.num_output_tokens
    for stored, entry in zip(again.entries, report.entries, strict=True):
        names = ("seconds", "output_tokens_per_s", "peak_kv_bytes", "kv_fill")
        assert [getattr(stored.metrics, n) for n in names] == [getattr(entry.metrics, n) for n in names]
        assert stored.metrics.ttft_s.p50 == entry.metrics.ttft_s.p50
        assert (stored.name, stored.runs_s, stored.same_tokens) == (entry.name, entry.runs_s, entry.same_tokens)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "report.json").read_text()


def test_a_workload_is_the_same_for_the_same_seed_and_within_its_limits(llm):
    first, again, other = (random_lengths(llm, 8, 5, 9, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.prompts != other.prompts
    assert {len(prompt) for prompt in first.prompts} <= set(range(5, 10))
    assert {params.max_tokens for params in first.params} <= set(range(5, 10))


def test_a_checkpoint_without_tokenizer_is_compared_on_random_ids(llm):
    workload = story_beginnings(llm, num_requests=3, max_tokens=4, seed=0)
    assert all(0 <= token < 1003 for prompt in workload.prompts for token in prompt)


def test_bench_ladder_reports_the_ratio_to_transformers_static(llm, tmp_path):
    arguments = [
        "bench",
        "ladder",
        "--model",
        str(llm.folder),
        "--num-requests",
        "2",
        "--shortest",
        "2",
        "--longest",
        "4",
    ]
    result = CliRunner().invoke(app, [*arguments, "--repeats", "1", "--figures", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "paged / transformers static =" in result.output
    assert "paged / transformers generate_batch =" in result.output
    report = Ladder.read(tmp_path / "bench-ladder.json")
    assert [rung.name for rung in report.entries] == [
        "static",
        "paged",
        "transformers",
        "transformers static",
        "transformers generate_batch",
    ]


def test_the_reference_is_one_request_at_a_time(llm, rungs, workload):
    alone = rungs["transformers"](replace(workload, prompts=workload.prompts[1:2], params=workload.params[1:2]))
    assert alone.token_ids[0] == rungs["transformers"](workload).token_ids[1]
