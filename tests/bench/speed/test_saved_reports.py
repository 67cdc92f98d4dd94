"""What a bench has measured is in its file before the next run starts, whatever ends the command."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_random_checkpoint
from typer.testing import CliRunner

from paged_infer import LLM
from paged_infer.bench.report import JsonReport
from paged_infer.bench.roofline import Roofline
from paged_infer.bench.speed import measure, recorded_steps, rounds, step_parts
from paged_infer.bench.speed.engine_runs import run_engine, watched_engine
from paged_infer.bench.speed.ladder import Ladder
from paged_infer.bench.speed.measure import ENGINE, Bench, SpeedReport
from paged_infer.bench.speed.recorded_steps import BUSY_STEPS, busy_share
from paged_infer.bench.speed.rounds import interleave
from paged_infer.bench.speed.speed_figure import speed_figure
from paged_infer.bench.speed.step_parts import StepReport, measure_step
from paged_infer.bench.speed.tables import print_speed, print_step
from paged_infer.bench.workloads import Workload, random_lengths
from paged_infer.cli import app
from paged_infer.engine.engine import LLMEngine

ROOF = Roofline(1e9, 1e9, 1e10, "float32", "cpu")


class Stopped(BaseException):
    """Like Ctrl-C or a signal: no ``except Exception`` catches it."""


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    folder = save_random_checkpoint("qwen3", tmp_path_factory.mktemp("saved"))
    return LLM(folder, num_blocks=64, max_num_seqs=8, device="cpu")


@pytest.fixture
def workload(llm: LLM) -> Workload:
    return random_lengths(llm, num_requests=3, shortest=3, longest=9, seed=1)


LENGTHS = ["--num-requests", "2", "--shortest", "2", "--longest", "4"]
COMMANDS = {
    "latency": ["--prompt-tokens", "4", "--max-tokens", "3", "--peer", "none"],
    "throughput": ["--num-requests", "2", "--scale", "0.01", "--peer", "none"],
    "optimisations": ["--num-requests", "2", "--scale", "0.01"],
    "load": [*LENGTHS, "--clients", "2", "--rate", "50"],
    "ladder": [*LENGTHS, "--peer", "static"],
    "step": [*LENGTHS, "--beside", "torch"],
    "speculation": ["--at-once", "1", "--at-once", "2", "--max-tokens", "3"],
}
KINDS: dict[str, Any] = {"ladder": Ladder, "step": StepReport}


def num_runs(report: Any) -> int:
    if isinstance(report, StepReport):
        return sum(one.num_runs or 0 for one in report.backends)
    return sum(len(entry.runs_s) for entry in report.entries)


@pytest.mark.parametrize("stopped_after", [1, 3])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_stopped_leaves_the_runs_that_have_finished(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, stopped_after: int
) -> None:
    monkeypatch.setattr("paged_infer.bench.roofline.measure", lambda device, dtype: ROOF)
    saves, save = count(1), JsonReport.save

    def save_and_stop(self: JsonReport, path: Path) -> None:
        save(self, path)
        if next(saves) == stopped_after:
            raise Stopped

    monkeypatch.setattr(JsonReport, "save", save_and_stop)
    options = ["--model", str(llm.folder), "--device", "cpu", "--repeats", "3", "--figures", str(tmp_path)]
    with pytest.raises(Stopped):
        CliRunner().invoke(app, ["bench", command, *COMMANDS[command], *options])
    assert [path.name for path in tmp_path.iterdir()] == [f"bench-{command}.json"]
    report = KINDS.get(command, SpeedReport).read(tmp_path / f"bench-{command}.json")
    assert not report.is_complete
    is_first = command == "latency"  # its first run is the first that is saved
    assert num_runs(report) == stopped_after - is_first
    if command == "step":
        print_step(report)
    else:
        print_speed(report)
        assert len(speed_figure(report).png()) > 1000
        assert all(entry.metrics.seconds > 0 for entry in report.entries)


def test_a_report_read_while_another_is_written_is_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "report.json", Path.write_text
    ROOF.save(path)

    def write_half(self: Path, text: str, **options: Any) -> int:
        write(self, text[: len(text) // 2], **options)
        raise Stopped

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(Stopped):
        Roofline(2.0, 2.0, 2.0).save(path)
    assert Roofline.read(path) == ROOF


def test_a_finished_report_is_complete_and_those_of_before_are_read_as_complete(llm, workload, tmp_path) -> None:
    saved: list[SpeedReport] = []
    report = Bench(llm, ROOF, 2, save=saved.append).throughput({ENGINE: watched_engine(llm)}, workload)
    assert report.is_complete and [one.is_complete for one in saved] == [False, False]
    stored = report.as_json()
    for name in ("is_complete", "notes"):
        del stored[name]
    (tmp_path / "old.json").write_text(json.dumps(stored))
    assert SpeedReport.read(tmp_path / "old.json").is_complete


# -- The record of some steps


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine computes on the CPU, and the bench treats it as one on a GPU."""
    monkeypatch.setattr(LLMEngine, "device", property(lambda self: torch.device("cuda")))


@pytest.mark.parametrize("error", [RuntimeError("CUPTI is busy"), Stopped()])
def test_a_record_that_fails_comes_after_the_numbers_and_loses_none(llm, workload, on_cuda, monkeypatch, error) -> None:
    saved: list[SpeedReport] = []

    def fail(*_: Any) -> list[float]:
        assert len(saved) == 2 and len(saved[-1][ENGINE].runs_s) == 2, "every run is saved before"
        raise error

    monkeypatch.setattr(measure, "busy_share", fail)
    bench = Bench(llm, ROOF, 2, save=saved.append)
    if isinstance(error, Stopped):
        with pytest.raises(Stopped):
            bench.throughput({ENGINE: watched_engine(llm)}, workload)
        return
    report = bench.throughput({ENGINE: watched_engine(llm)}, workload)
    assert report.is_complete and len(report[ENGINE].runs_s) == 2 and report[ENGINE].metrics.overhead_share is None
    assert report.notes == ["the engine's overhead was not recorded: RuntimeError: CUPTI is busy"]


def test_the_overhead_is_what_the_record_leaves_of_the_time(llm, workload, on_cuda, monkeypatch) -> None:
    monkeypatch.setattr(measure, "busy_share", lambda engine, workload, step_s: [0.75 for _ in step_s])
    report = Bench(llm, ROOF, 2).throughput({ENGINE: watched_engine(llm)}, workload)
    assert report[ENGINE].metrics.overhead_share == 0.25


@pytest.mark.parametrize("ahead", [False, True], ids=["one-by-one", "ahead"])
def test_some_steps_of_the_middle_are_recorded_and_the_rest_is_aborted(llm, monkeypatch, ahead) -> None:
    other = LLM(llm.folder, num_blocks=64, max_num_seqs=8, device="cpu", async_scheduling=ahead)
    engine = other.engine
    workload = random_lengths(llm, num_requests=3, shortest=60, longest=60, seed=1)
    run = run_engine(engine, workload)
    assert len(run.step_s) == 60 + ahead and sorted(run.step_s) == run.step_s
    step, steps, recorded = engine.step, count(), []
    monkeypatch.setattr(engine, "step", lambda: (recorded.append(next(steps)), step())[1])

    def record(run: Any) -> float:
        recorded.clear()
        run()
        inside[:] = recorded
        return 3.0

    inside: list[int] = []
    monkeypatch.setattr(recorded_steps, "cuda_busy_s", record)
    moments = [float(n) ** 2 for n in range(60)]  # step n takes 2 n - 1 seconds
    first = (60 - BUSY_STEPS) // 2
    elapsed_s = sum(2 * n - 1 for n in range(first, first + BUSY_STEPS))
    assert busy_share(engine, workload, [moments, moments]) == [pytest.approx(3.0 / elapsed_s)] * 2
    assert inside == [*range(first, first + BUSY_STEPS)]
    assert not engine.has_unfinished_requests and engine._running is None
    other.check_integrity()
    assert other.stats()["free_blocks"] == 64


def test_a_workload_of_a_few_steps_is_recorded_as_far_as_it_goes(llm, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(recorded_steps, "cuda_busy_s", lambda run: calls.append(len(run())) or 1.0)
    workload = random_lengths(llm, num_requests=1, shortest=5, longest=5, seed=1)
    assert busy_share(llm.engine, workload, [[1.0, 2.0, 3.0, 4.0, 5.0]]) == [pytest.approx(1 / 3)]
    assert calls == [3]
    with pytest.raises(ValueError, match="2 steps"):
        busy_share(llm.engine, workload, [[1.0, 2.0]])


# -- The time limit


class Clock:
    """A clock that advances by a second for each run."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now_s

    def system(self, name: str, seconds: float = 1.0) -> Any:
        def run(workload: Any) -> str:
            self.now_s += seconds
            self.order.append(name)
            return name

        return run


@pytest.mark.parametrize(("deadline_s", "num_rounds"), [(0.0, 1), (3.9, 1), (4.0, 2), (9.0, 4), (100.0, 5)])
def test_no_round_is_begun_that_would_end_after_the_limit(monkeypatch, deadline_s, num_rounds) -> None:
    clock = Clock()
    monkeypatch.setattr(rounds, "perf_counter", clock)
    systems = {name: clock.system(name) for name in ("a", "b")}
    runs = interleave(systems, None, 5, deadline_s=deadline_s)  # type: ignore[arg-type]
    assert clock.order == ["a", "b"] * num_rounds, "every system runs equally often"
    assert runs == {"a": ["a"] * num_rounds, "b": ["b"] * num_rounds}


def test_time_is_kept_free_for_what_follows_the_rounds(monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(rounds, "perf_counter", clock)
    interleave({"a": clock.system("a")}, None, 9, deadline_s=5.0, reserved=1.0)  # type: ignore[arg-type]
    assert clock.order == ["a"] * 4


def test_what_runs_once_does_not_count_for_the_rounds_to_come(monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(rounds, "perf_counter", clock)
    systems = {"a": clock.system("a"), "slow": clock.system("slow", 50.0)}
    interleave(systems, None, 3, deadline_s=53.0, once=("slow",))  # type: ignore[arg-type]
    assert clock.order == ["a", "slow", "a", "a"]


def test_phases_share_the_time_and_the_report_has_the_number_of_runs(llm, workload, monkeypatch, capsys) -> None:
    clock = Clock()
    for module in (measure, rounds):
        monkeypatch.setattr(module, "perf_counter", clock)
    real = run_engine

    def slow(*arguments: Any, **options: Any) -> Any:
        run = real(*arguments, **options)
        clock.now_s += 1.0
        return run

    monkeypatch.setattr(measure, "run_engine", slow)
    monkeypatch.setattr(measure, "run_warm_ups", lambda systems, workload: None)
    report = Bench(llm, ROOF, 3, deadline_s=6.0).load(workload, [1], [100.0], [])
    assert [len(entry.runs_s) for entry in report.entries] == [2, 3]  # a second was spent before: 2.5 s for the first
    print_speed(report)
    shown = capsys.readouterr().out
    assert "2 of 3" in shown and "3 of 3" not in shown and "INCOMPLETE" not in shown


def test_a_limit_cuts_the_repeats_of_the_step(make_llm, monkeypatch, capsys) -> None:
    clock = Clock()
    monkeypatch.setattr(step_parts, "perf_counter", clock)
    llm = make_llm(attention_backend="torch")
    monkeypatch.setattr(step_parts, "_run", lambda *a, **k: (clock.system("run")(None), (3, 1.0, [0.1] * 11))[1])
    report = measure_step([llm], random_lengths(llm, 2, 2, 4, seed=0), repeats=5, deadline_s=4.0)
    assert report.backends[0].num_runs == 3
    print_step(report)
    assert "3 of 5 interleaved runs" in capsys.readouterr().out


def test_the_limit_of_a_command_counts_from_its_start(llm, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("paged_infer.bench.roofline.measure", lambda device, dtype: ROOF)
    options = ["--model", str(llm.folder), "--device", "cpu", "--figures", str(tmp_path), "--time-limit", "0"]
    result = CliRunner().invoke(app, ["bench", "throughput", *COMMANDS["throughput"], *options])
    assert result.exit_code == 0, result.output
    assert "1 of 3" in result.output
    report = SpeedReport.read(tmp_path / "bench-throughput.json")
    assert report.repeats == 3 and len(report[ENGINE].runs_s) == 1 and report.is_complete
