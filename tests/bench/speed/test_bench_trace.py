"""bench trace: a record that a viewer opens, with exactly the steps that were asked for."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paged_infer.bench.speed.trace import _kernel_times, print_recorded, record_steps
from paged_infer.bench.workloads import random_lengths
from paged_infer.cli import app
from paged_infer.config import EngineConfig


def names(path: Path) -> list[str]:
    """The names of the steps in a record, in order."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = [event for event in events if str(event.get("name")).startswith("step ")]
    return [event["name"] for event in sorted(steps, key=lambda event: event["ts"])]


@pytest.mark.parametrize("ahead", [False, True], ids=["one-by-one", "ahead"])
@pytest.mark.parametrize(("num_prompt", "num_decode"), [(2, 3), (0, 1)])
def test_the_record_has_exactly_the_steps_that_were_asked_for(
    make_llm, tmp_path, ahead: bool, num_prompt: int, num_decode: int
) -> None:
    llm = make_llm(max_num_batched_tokens=16, async_scheduling=ahead)
    workload = random_lengths(llm, num_requests=4, shortest=12, longest=16, seed=0)
    path = tmp_path / "some" / "trace.json.gz"
    recorded = record_steps(llm.engine, workload, num_prompt, num_decode, path)
    assert recorded.steps == names(path) and len(recorded.steps) == num_prompt + num_decode
    assert [" chunk" in name for name in recorded.steps] == [True] * num_prompt + [False] * num_decode
    numbers = [int(re.match(r"step (\d+): ", name)[1]) for name in recorded.steps]
    assert numbers == [*range(numbers[0], numbers[0] + len(numbers))]
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert recorded.num_kernels > 20 and recorded.kernels[0][2] >= recorded.kernels[-1][2]
    assert not any(name.startswith(("step ", "schedule")) for name, _, _ in recorded.kernels)
    assert not llm.engine.has_unfinished_requests
    llm.check_integrity()
    assert {"launch", "schedule", "settle"}.isdisjoint({*vars(llm.engine.executor), *vars(llm.engine.scheduler)})


def test_a_workload_without_such_steps_is_refused_with_what_it_has(make_llm, tmp_path) -> None:
    llm = make_llm()
    workload = random_lengths(llm, num_requests=2, shortest=6, longest=6, seed=0)
    with pytest.raises(ValueError, match="1 steps have chunks of prompts and 5 have none"):
        record_steps(llm.engine, workload, 2, 3, tmp_path / "trace.json.gz")
    assert not llm.engine.has_unfinished_requests and list(tmp_path.iterdir()) == []
    llm.check_integrity()


def test_the_command_records_five_and_ten_steps_and_prints_where(llm, tmp_path) -> None:
    small = ["--num-requests", "8", "--model", str(llm.folder), "--device", "cpu", "--figures", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "trace", *small, "--max-num-batched-tokens", "64"])
    assert result.exit_code == 0, result.output
    path = tmp_path / "bench-trace.json.gz"
    assert [" chunk" in name for name in names(path)] == [True] * 5 + [False] * 10
    assert "15 steps" in result.output and str(path) in result.output.replace("\n", "")
    assert "kernel events" in result.output and "share" in result.output
    assert path.stat().st_size < 16 * 2**20


def test_on_a_cpu_the_prompts_take_several_steps_unless_told_otherwise(llm, tmp_path, monkeypatch) -> None:
    budgets = []

    def record(engine: Any, *_: Any) -> Any:
        budgets.append(engine.scheduler.max_num_batched_tokens)
        raise ValueError("enough")

    monkeypatch.setattr("paged_infer.bench.speed.trace.record_steps", record)
    for option in ([], ["--max-num-batched-tokens", "100"]):
        command = ["bench", "trace", "--model", str(llm.folder), "--device", "cpu", *option]
        assert CliRunner().invoke(app, command).exit_code == 2
    assert budgets == [256, 100] and EngineConfig().max_num_batched_tokens not in budgets


def test_kernels_of_a_gpu_are_added_up_by_name(tmp_path, capsys) -> None:
    from paged_infer.bench.speed.trace import Recorded

    events = [{"name": "a", "dur": 1500.0}, {"name": "b", "dur": 2000.0}, {"name": "a", "dur": 1500.0}]
    kernels = _kernel_times(events)
    assert kernels == [("a", 2, 3.0), ("b", 1, 2.0)]
    (tmp_path / "t.json.gz").write_bytes(b"")
    print_recorded(Recorded(tmp_path / "t.json.gz", ["step 1: 2 decodes"], kernels, num_in_graphs=2))
    shown = capsys.readouterr().out
    assert "60.0%" in shown and "3 kernel events, 2 of them in CUDA graphs" in shown
