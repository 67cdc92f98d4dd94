"""A sweep compiles and checks each candidate before it times it, and a table holds only what beats today's tiles."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import typer
from holding import LIMIT_S
from typer.testing import CliRunner

from paged_infer.bench import roofline
from paged_infer.bench.kernels import comparisons, sweep_cases, sweep_cli
from paged_infer.bench.kernels import sweep as sweeping
from paged_infer.bench.kernels.peers import Ready, Unavailable
from paged_infer.bench.kernels.problems import paged_attention_float64
from paged_infer.bench.kernels.report import LEFT_OUT
from paged_infer.bench.kernels.sweep import AGAIN, TODAY, Built, CaseResult, SweepReport, Trial, Winner, sweep
from paged_infer.bench.kernels.sweep_cases import Candidate, Case, candidates, small_cases
from paged_infer.bench.roofline import Roofline
from paged_infer.bench.timing import Timing
from paged_infer.cli import app
from paged_infer.kernels.attention.tile_table import (
    LINEAR_KERNELS,
    Key,
    LinearKey,
    SplitRule,
    Tile,
    _check_tile,
    read_table,
    tables,
)
from paged_infer.kernels.triton_runtime import HAS_TRITON, INTERPRETED, launches_go_to

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs triton, interpreting")
CPU = torch.device("cpu")
SMALL = Tile(16, 32, 4, 1)
LARGE = Tile(16, 64, 4, 1)
KEY = ["decode", "bfloat16", 32, 2, False]


@pytest.fixture
def two_candidates(monkeypatch):
    """A sweep of two decode tiles, computed in float64, with made-up times. The list grows with each timing."""
    monkeypatch.setattr(sweep_cases, "TILES", {**dict.fromkeys(sweep_cases.TILES, ()), "decode": (SMALL, LARGE)})
    monkeypatch.setattr(sweep_cases, "SPLIT_RULES", (rule := SplitRule(4, 16, 3),))
    monkeypatch.setattr(sweep_cases.candidates, "__defaults__", ((rule,),))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(Case, "call", lambda self, problem, candidate=None: exactly(problem))
    timings = []

    def timed(call, **_):
        timings.append(call)
        return Timing((1.0,), "cuda graph")

    monkeypatch.setattr(comparisons, "time_cuda_graph", timed)
    return timings


def exactly(problem, factor: float = 1.0) -> Ready:
    return Ready(lambda: (factor * paged_attention_float64(problem)).to(torch.bfloat16))


def decode_case():
    return next(case for case in small_cases() if case.kernel == "decode")


def last(results):
    *_, result = results
    return result


def made_up(seconds: dict[str, float], title: str = "a", **options) -> CaseResult:
    trials = [Trial(name, s, "cuda graph") for name, s in seconds.items()]
    return CaseResult(title, "decode", KEY, 1e6, trials, **{"is_finished": True} | options)


# -- Candidates


@pytest.mark.parametrize("kernel", ["decode", "flash", "prefill", "w4a16", "w8a16", "w8a8"])
def test_candidates_are_distinct_and_within_the_kernels_limits(kernel):
    names = [candidate.label for candidate in candidates(kernel)]
    assert len(set(names)) == len(names) >= 5
    for candidate in candidates(kernel):
        _check_tile(candidate.tile)
        assert (candidate.splits is None) is (kernel != "decode")


def test_cases_count_what_a_kernel_must_read_or_compute():
    cases = {case.title: case for case in sweep_cases.sweep_cases()}
    assert len(cases) == 2 * 4 + 2 * 2 * 2 + 3 * 3 * 2
    assert cases["w4a16, gate and up 28,672 x 4,096, 16 tokens"].work == 28_672 * 4096 / 2
    assert cases["w8a8, down 4,096 x 14,336, 2,048 tokens"].work == 2 * 2048 * 4096 * 14_336
    assert cases["w8a8, down 4,096 x 14,336, 2,048 tokens"].key == LinearKey("w8a8", "bfloat16", False)
    assert cases["decode, Llama-3-8B, 32 x 4k"].work == 32 * 4096 * 2 * 8 * 128 * 2
    assert cases["prefill, Qwen3-0.6B, 1 x 16k"].work == 4 * 16 * 128 * 16_384**2 / 2
    assert cases["flash, Llama-3-8B, 4 x 4k"].key == Key("flash", "bfloat16", 128, 4)
    assert cases["decode, Qwen3-0.6B, 200 mixed"].key == Key("decode", "bfloat16", 128, 2)
    mixed = [before + 1 for before, _ in sweep_cases.MIXED]
    assert len(mixed) == 200 and mixed == sorted(mixed, reverse=True) and min(mixed) >= 100


@needs_interpreter
def test_a_candidates_call_takes_its_tile_and_todays_does_not(monkeypatch):
    taken = []
    monkeypatch.setattr("paged_infer.kernels.attention.paged_decode.launch", lambda *args, **named: taken.append(named))
    case = decode_case()
    problem = case.problem(CPU)
    case.call(problem, Candidate(LARGE, SplitRule(1, 16, 1))).call()
    case.call(problem).call()
    blocks = [named["BLOCK_N"] for named in taken if "BLOCK_N" in named]
    assert blocks == [64, 16]


@needs_interpreter
@pytest.mark.parametrize("arch", [90, 80])
def test_a_tma_candidate_runs_the_tma_kernel_or_has_the_reason_why_not(arch):
    kernels = []
    case = next(case for case in sweep_cases.sweep_cases() if case.kernel == "flash")
    problem = case.problem("meta")
    some = [candidate for candidate in candidates("flash") if candidate.tile.use_tma]
    assert len(some) >= 2
    with launches_go_to(lambda kernel, *_: kernels.append(kernel.fn.__name__), divmod(arch, 10)):
        for candidate in some:
            if arch == 90:
                case.call(problem, candidate).call()
            else:
                with pytest.raises(Unavailable, match="on sm90 or later"):
                    case.call(problem, candidate)
    assert kernels == ["_flash_tma_kernel"] * len(some) * (arch == 90)


@needs_interpreter
def test_a_candidate_of_each_kernel_is_right_in_the_interpreter(monkeypatch):
    tiles = {kernel: some[-1:] for kernel, some in sweep_cases.TILES.items()}
    monkeypatch.setattr(sweep_cases, "TILES", tiles)
    monkeypatch.setattr(sweep_cases, "SMALL_PROMPTS", {"1 x 20": ((0, 20),)})
    monkeypatch.setattr(sweeping, "SMALL_SPLIT_RULES", sweep_cases.SMALL_SPLIT_RULES[-1:])
    checked = [*sweeping.check_interpreted()]
    assert [title.split(",")[0] for title, *_ in checked] == ["flash", "prefill", "decode", *LINEAR_KERNELS]
    assert all(error <= allowed for *_, error, allowed in checked)


# -- Checked, then timed


def test_right_candidates_are_timed_beside_todays_tile_which_comes_twice(two_candidates):
    result = last(sweep([decode_case()], CPU, {}, math.inf, ""))
    names = [candidate.label for candidate in candidates("decode")]
    assert [trial.name for trial in result.trials] == [TODAY, *names, AGAIN]
    assert [trial.seconds for trial in result.trials] == [1.0] * 4
    assert result.is_finished and not result.was_left_out
    assert len(two_candidates) == 4 * comparisons.ROUNDS


def test_a_wrong_candidate_is_not_timed_and_one_that_did_not_compile_is_not_run(two_candidates, monkeypatch):
    small, large = candidates("decode")
    case, run = decode_case(), []

    def call(self, problem, candidate=None):
        run.append(candidate)
        return exactly(problem, 1.2 if candidate == small else 1.0)

    monkeypatch.setattr(Case, "call", call)
    built = {(case.key, large.label): Built(error="needs 300,000 bytes of shared memory, sm90 has 232,448")}
    result = last(sweep([case], CPU, built, math.inf, ""))
    notes = {trial.name: (trial.seconds, trial.note) for trial in result.trials}
    assert notes[small.label][0] is None and notes[small.label][1].startswith("wrong: ")
    assert notes[large.label] == (None, "needs 300,000 bytes of shared memory, sm90 has 232,448")
    assert notes[TODAY] == notes[AGAIN] == (1.0, "cuda graph")
    assert large not in run and len(two_candidates) == 2 * comparisons.ROUNDS


def test_each_timing_is_a_result_and_past_the_deadline_none_begins(two_candidates):
    results = list(sweep([decode_case()], CPU, {}, math.inf, ""))
    known = [sum(trial.seconds is not None for trial in result.trials) for result in results]
    assert known[:5] == [0, 1, 2, 3, 4]
    assert [result.is_finished for result in results] == [False] * (len(results) - 1) + [True]
    (late,) = sweep([decode_case()], CPU, {}, 0.0, "the time limit of 5 s")
    assert {trial.note for trial in late.trials} == {f"{LEFT_OUT}the time limit of 5 s had passed"}
    assert late.was_left_out


def test_a_batch_that_the_device_has_no_room_for_does_not_end_the_sweep(two_candidates, monkeypatch):
    def too_large(problem):
        raise torch.OutOfMemoryError("CUDA out of memory: 2 GiB\nmore about it")

    monkeypatch.setattr(sweeping, "exact_output", too_large)
    results = list(sweep([decode_case()] * 2, CPU, {}, math.inf, ""))
    assert [result.is_finished for result in results] == [True, True]
    notes = {trial.note for result in results for trial in result.trials}
    assert notes == {"no room for the problem in float64: CUDA out of memory: 2 GiB"}
    assert two_candidates == []


# -- Winners


def test_the_best_that_beats_today_by_more_than_the_noise_wins():
    times = {TODAY: 1.0, AGAIN: 1.01, "good": 0.9, "better": 0.8}
    (winner,) = SweepReport({}, None, [made_up(times), made_up(times, "b")]).winners()
    assert winner == Winner(KEY, "better", pytest.approx(1 / 0.8), LEAST := pytest.approx(0.02))
    assert sweeping.LEAST_GAIN == LEAST


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({AGAIN: 1.0, "x": 0.985}, {AGAIN: 1.0, "x": 0.985}),  # a gain of 1.5 %: below the least
        ({AGAIN: 1.2, "x": 0.8}, {AGAIN: 1.0, "x": 0.8}),  # today's two differ by 17 % in one case: the margin is 33 %
        ({AGAIN: 1.0, "x": 0.5}, {AGAIN: 1.0, "x": 1.1}),  # slower in one case
        ({AGAIN: 1.0, "x": 0.5}, {AGAIN: 1.0}),  # wrong, or not run, in one case
        ({AGAIN: 1.0, "x": 0.5}, {"x": 0.5}),  # the noise is not known
    ],
)
def test_a_candidate_that_might_not_be_better_does_not_win(first, second):
    cases = [made_up({TODAY: 1.0} | times, title) for title, times in (("a", first), ("b", second))]
    assert SweepReport({}, None, cases).winners() == []


def test_one_batch_alone_has_no_winner_where_more_are_planned(tmp_path):
    """What helps it may harm the next one; and a table that an earlier run left there is not this run's."""
    better = {TODAY: 1.0, AGAIN: 1.0, "16 x 32, 4 warps, 6 stages, splits 2/256/64": 0.5}
    report = SweepReport({}, cases=[made_up(better)], planned=[KEY, KEY])
    assert report.winners() == []
    left = tmp_path / "tiles-sm90.json"
    left.write_text("of an earlier run")
    sweep_cli._write_winners(report, left, 90)
    assert not left.exists()
    report.cases.append(made_up(better, "b"))
    assert len(report.winners()) == 1


def test_cases_that_the_time_cut_short_have_no_winner():
    times = {TODAY: 1.0, AGAIN: 1.0, "x": 0.5}
    whole, unfinished = made_up(times), made_up(times, "b", is_finished=False)
    cut = made_up(times, "b")
    cut.trials.append(Trial("y", None, f"{LEFT_OUT}the time limit had passed"))
    assert [winner.name for winner in SweepReport({}, None, [whole]).winners()] == ["x"]
    assert SweepReport({}, None, [whole, unfinished]).winners() == []
    assert SweepReport({}, None, [whole, cut]).winners() == []


def test_the_report_survives_its_json(tmp_path):
    report = SweepReport({"device": "-"}, Roofline(4e12, 3e12, 8e14), [made_up({TODAY: 1.0, AGAIN: 1.0, "x": 0.5})])
    report.cases[0].trials.append(Trial("y", None, "wrong", Built(100, 8, 1024)))
    report.save(tmp_path / "sweep.json")
    assert SweepReport.read(tmp_path / "sweep.json") == report
    assert json.loads((tmp_path / "sweep.json").read_text())["winners"][0]["name"] == "x"


# -- The command


def test_what_a_gpu_would_do_from_end_to_end_with_made_up_times(two_candidates, tmp_path, monkeypatch, capsys):
    """The larger tile is the fastest: it becomes an entry, beside those that the table has."""
    tables.cache_clear()
    there = {Key("flash", "bfloat16", 64, 1): (Tile(64, 64, 4, 2), None)}
    monkeypatch.setattr(sweep_cli, "tables", lambda: {90: there})
    monkeypatch.setattr(sweep_cli, "sweep_cases", lambda: [decode_case()])
    monkeypatch.setattr(sweep_cli, "capability", lambda device: (9, 0))
    monkeypatch.setattr(roofline, "measure", lambda device: Roofline(4e12, 3e12, 8e14, "bfloat16", "made up"))
    small, large = candidates("decode")
    built = {(decode_case().key, small.label): Built(96, 0, 38_144), (decode_case().key, large.label): Built(168, 0, 1)}
    monkeypatch.setattr(sweep_cli, "compile_all", lambda cases, arch: built)
    made = iter([4e-6, 5e-6, 2e-6, 4e-6] * comparisons.ROUNDS)
    monkeypatch.setattr(comparisons, "time_cuda_graph", lambda call, **_: Timing((next(made),), "cuda graph"))
    saved = []
    monkeypatch.setattr(SweepReport, "save", lambda self, path: saved.append(self.as_json()))

    sweep_cli._sweep(CPU, math.inf, tmp_path)
    said = capsys.readouterr().out
    for words in ("2 candidates compiled", "decode, small, mixed", "38,144", "2.000", "winners", "1.020"):
        assert words in said
    counts = [sum(trial["seconds"] is not None for trial in report["cases"][0]["trials"]) for report in saved]
    assert counts == [0, 1, 2, 3, 4, 4]  # saved whenever one more is known
    assert read_table(tmp_path / "tiles-sm90.json") == (90, there | {decode_case().key: (LARGE, large.splits)})


def test_if_todays_tile_is_wrong_the_command_fails(two_candidates, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep_cli, "sweep_cases", lambda: [decode_case()])
    monkeypatch.setattr(sweep_cli, "capability", lambda device: (9, 0))
    monkeypatch.setattr(roofline, "measure", lambda device: Roofline(4e12, 3e12, 8e14))
    monkeypatch.setattr(sweeping, "largest_error", lambda *_: math.nan)

    def broken(cases, arch):
        raise OSError("no more processes")

    monkeypatch.setattr(sweep_cli, "compile_all", broken)
    with pytest.raises(typer.Exit) as exit_:
        sweep_cli._sweep(CPU, math.inf, tmp_path)
    assert exit_.value.exit_code == 1
    said = capsys.readouterr()
    assert "not compiled beforehand: OSError: no more processes" in said.out
    assert "wrong: nan from float64" in said.out and "no table is written" in said.out
    assert said.err.startswith("error: today's tile did not run, or is wrong: decode, small, mixed")
    assert [path.name for path in tmp_path.iterdir()] == ["bench-sweep.json"]


@needs_interpreter
@pytest.mark.parametrize("is_right", [True, False])
def test_on_a_cpu_candidates_are_checked_and_not_timed(is_right, two_candidates, tmp_path, monkeypatch):
    if not is_right:
        monkeypatch.setattr(Case, "call", lambda self, problem, candidate=None: exactly(problem, 1.2))
    monkeypatch.setattr(sweeping, "small_cases", lambda: [decode_case()])
    monkeypatch.setattr(sweeping, "SMALL_SPLIT_RULES", (SplitRule(2**20, 16, 3),))
    result = CliRunner().invoke(app, ["bench", "kernels", "--sweep", "--device", "cpu", "--figures", str(tmp_path)])
    assert "interpreted: candidates are checked on small shapes, and not timed" in result.output
    assert result.exit_code == (0 if is_right else 1), result.output
    assert ("error: differs from float64: decode, small, mixed: 16 x 32" in result.output) is not is_right
    assert two_candidates == [] and list(tmp_path.iterdir()) == []


def test_the_interpreter_runs_each_block_size_once(monkeypatch):
    tiles = (Tile(16, 32, 4, 6), Tile(16, 32, 1, 6), Tile(16, 64, 4, 4))
    monkeypatch.setattr(sweep_cases, "TILES", {"decode": tiles})
    monkeypatch.setattr(sweeping, "small_cases", lambda: [decode_case()])
    monkeypatch.setattr(Case, "call", lambda self, problem, candidate=None: exactly(problem))
    names = [name for _, name, _, _ in sweeping.check_interpreted()]
    assert [name.split(", splits")[0] for name in names] == [
        "16 x 32, 4 warps, 6 stages", "16 x 32, 4 warps, 6 stages",
        "16 x 64, 4 warps, 4 stages", "16 x 64, 4 warps, 4 stages",
    ]  # fmt: skip


def test_without_triton_and_with_compile_only_it_is_refused_in_one_line(monkeypatch):
    result = CliRunner().invoke(app, ["bench", "kernels", "--sweep", "--compile-only"])
    assert (result.exit_code, result.output) == (2, "error: --sweep does not go with --compile-only\n")
    monkeypatch.setattr("paged_infer.kernels.triton_runtime.HAS_TRITON", False)
    result = CliRunner().invoke(app, ["bench", "kernels", "--sweep", "--device", "cpu"])
    assert (result.exit_code, result.output) == (2, "error: triton is not installed: there are no kernels to run\n")


COMPILE = """
from paged_infer.bench.kernels import sweep_cases
from paged_infer.bench.kernels.sweep import compile_all
from paged_infer.kernels.attention.tile_table import Tile
if __name__ == "__main__":
    case = next(case for case in sweep_cases.sweep_cases() if case.kernel == "flash")
    for (key, label), built in compile_all([case], 90).items():
        print(key.kernel, label, built.registers > 0, built.error, sep="; ")
"""


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_candidates_are_compiled_in_processes_and_one_that_does_not_fit_is_known(tmp_path):
    """Four stages of 128 keys need 4 x 64 KiB of shared memory and more."""
    script = tmp_path / "compile.py"
    tiles = "sweep_cases.TILES = {'flash': (Tile(64, 64, 4, 3), Tile(128, 128, 8, 4))}\n"
    script.write_text(COMPILE.replace("if __name__", tiles + "if __name__"))
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=LIMIT_S, env=environment
    )
    assert result.returncode == 0, result.stderr
    fits, too_large = result.stdout.splitlines()
    assert fits == "flash; 64 x 64, 4 warps, 3 stages; True; "
    assert too_large.startswith("flash; 128 x 128, 8 warps, 4 stages; True; needs ")
    assert too_large.endswith(" bytes of shared memory, sm90 has 232,448")
