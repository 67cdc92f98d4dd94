"""Before a run is timed, every kind of step that selects a kernel of its own has run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from checkpoints import save_random_checkpoint

from paged_infer import LLM, SamplingParams
from paged_infer.bench.roofline import Roofline
from paged_infer.bench.speed import engine_runs, measure
from paged_infer.bench.speed.engine_runs import run_engine, watched_engine
from paged_infer.bench.speed.ladder import run_ladder
from paged_infer.bench.speed.measure import ENGINE, REFERENCE, Bench, run_warm_ups
from paged_infer.bench.speed.speculation import PLAIN, measure_speculation
from paged_infer.bench.workloads import Workload

ROOF = Roofline(1e9, 1e9, 1e10, "float32", "cpu")
OPTIONS: dict[str, Any] = {"num_blocks": 256, "max_num_seqs": 8, "device": "cpu", "max_num_batched_tokens": 300}


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    return LLM(save_random_checkpoint("qwen3", tmp_path_factory.mktemp("warm")), **OPTIONS)


def power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def kinds(step: Any) -> set[tuple[str, int]]:
    """What a step's kernels are compiled for: rows of a tile of queries, and splits of 256 keys, as powers of two."""
    chunks = [s.num_tokens for s in step.sequences if s.num_tokens > 1]
    longest = max(s.num_computed_tokens + s.num_tokens for s in step.sequences)
    found = {("queries", min(128, max(16, power_of_two(max(chunks)))))} if chunks else set()
    if len(chunks) < len(step.sequences):
        found.add(("splits", power_of_two(-(-longest // 256))))
    return found


@pytest.fixture
def launched(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The steps that the engine has launched."""
    steps: list[Any] = []
    launch = llm.engine.executor.launch
    monkeypatch.setattr(llm.engine.executor, "launch", lambda step: (steps.append(step), launch(step))[1])
    return steps


def workload() -> Workload:
    """All kinds of chunks: 20 tokens of the prompts are left for the last step, contexts grow past 256."""
    lengths = [(200, 8), (390, 120), (30, 280), (200, 4), (80, 4)]
    prompts = [[(7 * n + 3 * index) % 1000 for n in range(length)] for index, (length, _) in enumerate(lengths)]
    params = [SamplingParams(temperature=0.6, max_tokens=n, ignore_eos=True) for _, n in lengths]
    return Workload("w", prompts, params, 0)


def test_the_warm_ups_have_every_kind_of_step_of_their_workload(llm: LLM, launched: list[Any]) -> None:
    system = watched_engine(llm)
    run_warm_ups({ENGINE: system}, workload())
    warm, num_warm = set().union(*map(kinds, launched)), sum(step.num_tokens for step in launched)
    launched.clear()
    system(workload())
    timed = set().union(*map(kinds, launched))
    assert len(timed) >= 4 and timed <= warm
    assert {("queries", n) for n in (16, 32, 64, 128)} <= warm, "other options may cut the prompts elsewhere"
    assert num_warm < 4 * sum(map(len, workload().prompts)), "cheap"


def test_the_warm_ups_fit_where_the_workload_does() -> None:
    made = workload()
    longest = max(len(p) + (one.max_tokens or 0) for p, one in zip(made.prompts, made.params, strict=True))
    for one in made.warm_ups():
        for prompt, params in zip(one.prompts, one.params, strict=True):
            assert len(prompt) + (params.max_tokens or 0) <= longest
            assert params.max_tokens in (1, 2) and params.temperature == 0.6
    tiny = Workload("t", [[5]], [SamplingParams(max_tokens=1)], 0)
    assert [one.prompts for one in tiny.warm_ups()] == [[[5]], [[5]]]


@pytest.mark.parametrize("bench_of", ["throughput", "load", "ladder", "speculation"])
def test_each_bench_warms_its_engine_up_before_a_run_is_timed(llm, launched, monkeypatch, bench_of: str) -> None:
    timed: list[tuple[int, int]] = []
    real = run_engine
    made = workload()

    def run(engine: Any, asked: Workload, *arguments: Any, **options: Any) -> Any:
        begins = len(launched)
        found = real(engine, asked, *arguments, **options)
        if asked.params == made.params:
            timed.append((begins, len(launched)))
        return found

    for module in (measure, engine_runs):
        monkeypatch.setattr(module, "run_engine", run)
    bench, engine = Bench(llm, ROOF, 1), watched_engine(llm)
    if bench_of == "throughput":
        bench.throughput({ENGINE: engine}, made)
    elif bench_of == "load":
        bench.load(made, [8], [1000.0], [])
    elif bench_of == "ladder":
        made = replace(made, params=[replace(one, temperature=0) for one in made.params])
        run_ladder(llm, {ENGINE: engine, REFERENCE: engine}, made)
    else:
        measure_speculation(bench, {PLAIN: llm}, made, [len(made.prompts)])
    assert timed
    for begins, ends in timed:
        before = set().union(*map(kinds, launched[:begins]))
        assert set().union(*map(kinds, launched[begins:ends])) <= before
