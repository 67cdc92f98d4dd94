"""bench step: the parts add up to the steps, and watching leaves the engine as it was."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from paged_infer.bench.speed.step_parts import PARTS, measure_step, watch_parts
from paged_infer.bench.workloads import random_lengths
from paged_infer.cli import app


def test_parts_add_up_to_the_step_and_backends_differ(make_llm) -> None:
    llms = [make_llm(attention_backend=name) for name in ("torch", "sdpa")]
    report = measure_step(llms, random_lengths(llms[0], 3, 2, 6, seed=0), repeats=2)
    assert [one.backend for one in report.backends] == ["torch", "sdpa"]
    for one in report.backends:
        assert one.num_steps > 1
        assert dict(zip(PARTS, one.part_ms, strict=True)).keys() == {*PARTS}
        assert all(ms > 0 for ms in one.part_ms)
        assert sum(one.part_ms) == pytest.approx(one.step_ms, abs=0.01)  # of two runs, medians are means


def test_watching_leaves_no_trace(llm) -> None:
    engine = llm.engine
    owners = [
        *engine.decoder.modules(),
        engine.executor.runner,
        engine.executor.runner.cache,
        engine.executor.runner.sampler,
        engine.scheduler,
    ]
    before = [dict(owner.__dict__) for owner in owners]
    with watch_parts(llm):
        llm.generate([[3, 1, 4]], use_tqdm=False)
    after = [dict(owner.__dict__) for owner in owners]
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        assert all(new[name] is old[name] for name in ("ops", "backend", "forward") if name in old)


def test_the_command_prints_every_part_and_leaves_the_numbers(llm, tmp_path) -> None:
    small = ["--num-requests", "2", "--shortest", "2", "--longest", "4", "--repeats", "1", "--beside", "torch"]
    options = ["--model", str(llm.folder), "--figures", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "step", *small, *options])
    assert result.exit_code == 0, result.output
    assert all(part in result.output for part in PARTS) and "load before" in result.output
    assert (tmp_path / "bench-step.json").exists()
