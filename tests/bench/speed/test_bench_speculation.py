"""bench speculation: whatever is drafted, the same tokens; and how often drafts are right is counted, not guessed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from checkpoints import save_random_checkpoint
from typer.testing import CliRunner

from paged_infer import LLM
from paged_infer.bench.roofline import Roofline
from paged_infer.bench.speed import speculation
from paged_infer.bench.speed import step_spans as spans
from paged_infer.bench.speed.engine_runs import run_engine
from paged_infer.bench.speed.measure import Bench, SpeedReport
from paged_infer.bench.speed.speculation import PLAIN, measure_speculation, open_texts
from paged_infer.bench.speed.speed_figure import speed_figure
from paged_infer.bench.speed.step_spans import cpu_overhead_share, watch_steps
from paged_infer.bench.workloads import random_lengths
from paged_infer.cli import app

ROOF = Roofline(1e9, 1e9, 1e10, "float32", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_checkpoint("qwen3", tmp_path_factory.mktemp("speculation"))


@pytest.fixture(scope="module")
def engines(folder):
    itself = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}
    return {
        name: LLM(folder, num_blocks=64, device="cpu", speculative_config=config)
        for name, config in ((PLAIN, None), ("itself", itself))
    }


@pytest.fixture(scope="module")
def report(engines) -> SpeedReport:
    plain = engines[PLAIN]
    workload = open_texts(random_lengths(plain, 2, 3, 9, seed=1), max_tokens=17, temperature=0.7)
    return measure_speculation(Bench(plain, ROOF, repeats=2), engines, workload, [1, 2])


def test_a_model_that_drafts_for_itself_is_always_right_and_takes_a_quarter_of_the_steps(report):
    """17 tokens: the first after the prompt, then 4 steps of 3 drafts and a token of their own."""
    for size in (1, 2):
        plain, drafted = (report[f"{name}, {size} at once"] for name in (PLAIN, "itself"))
        assert (plain.metrics.acceptance_rate, plain.metrics.num_steps) == (None, 17)
        assert (drafted.metrics.acceptance_rate, drafted.metrics.num_steps) == (1.0, 5)
        assert plain.same_tokens and drafted.same_tokens
    assert report.is_right


def test_a_changed_token_is_seen(engines, monkeypatch):
    """If drafting let one other token through, in one run of one size, the report is not right."""
    plain = engines[PLAIN]
    workload = open_texts(random_lengths(plain, 2, 3, 9, seed=1), max_tokens=5, temperature=0)
    other = open_texts(random_lengths(plain, 2, 3, 9, seed=2), max_tokens=5, temperature=0)

    def watched(llm):
        def run(given):
            asked = (
                given
                if llm is plain
                else replace(other, prompts=other.prompts[: len(given.prompts)], params=given.params)
            )
            return run_engine(llm.engine, asked)

        return run

    monkeypatch.setattr(speculation, "watched_engine", watched)
    assert not measure_speculation(Bench(plain, ROOF, repeats=1), engines, workload, [2]).is_right


def test_what_the_draft_model_computes_is_not_overhead(engines, monkeypatch):
    drafting = engines["itself"].engine.executor.drafter.runner
    forward, seconds = drafting.decoder.forward, []  # on the spans' clock, a second a pass, and nothing else
    monkeypatch.setattr(spans, "perf_counter", lambda: float(len(seconds)))
    monkeypatch.setattr(drafting.decoder, "forward", lambda *a: (seconds.append(1), forward(*a))[1])
    with watch_steps(engines["itself"].engine) as span_s:
        engines["itself"].generate([[5, 6, 7]], use_tqdm=False)
    assert span_s["model"] == sum(span_s.values()) == len(seconds) > 0
    assert cpu_overhead_share(span_s) == 0


def test_a_report_is_kept_with_its_numbers_and_drawn_again(report, tmp_path):
    report.save(tmp_path / "bench.json")
    again = SpeedReport.read(tmp_path / "bench.json")
    assert again.entries == report.entries
    speed_figure(again).save(tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 5_000


def test_the_command_measures_every_method_and_says_what_drafts_bought(folder, tmp_path):
    models = ["--model", str(folder), "--draft-model", str(folder), "--device", "cpu"]
    sizes = ["--at-once", "2", "--max-tokens", "8", "--repeats", "1", "--figures", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "speculation", *models, *sizes])
    assert result.exit_code == 0, result.output
    for words in ("no drafts, 2 at once", "ngram, 2 at once", "draft model, 2 at once", "100.0%"):
        assert words in result.output
    assert (tmp_path / "bench-speculation.json").exists()


def test_a_draft_model_that_cannot_be_used_is_one_clear_line(folder, tmp_path):
    result = CliRunner().invoke(
        app, ["bench", "speculation", "--model", str(folder), "--draft-model", str(tmp_path / "nowhere")]
    )
    assert result.exit_code != 0
    assert "nowhere" in result.output and "Traceback" not in result.output
