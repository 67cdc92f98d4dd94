"""A near tie in float32 is reported and told from an error, on a GPU; on a CPU tokens are equal or wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import save_random_checkpoint
from torch import Tensor

from paged_infer import LLM, SamplingParams
from paged_infer.bench.metrics import Run
from paged_infer.bench.peers.transformers_peers import transformers_peers
from paged_infer.bench.roofline import Roofline
from paged_infer.bench.speed import measure
from paged_infer.bench.speed.engine_runs import watched_engine
from paged_infer.bench.speed.ladder import Ladder, run_ladder
from paged_infer.bench.speed.measure import ENGINE, Bench, Entry, SpeedReport
from paged_infer.bench.speed.same_tokens import (
    MAX_DIFFERING,
    TokenComparison,
    compare_tokens,
    decoder_logits,
    margin_bound,
    scores_of,
)
from paged_infer.bench.speed.speed_figure import ladder_figure
from paged_infer.bench.speed.tables import print_speed
from paged_infer.bench.workloads import Workload, random_lengths

VOCAB = 10
EXPECTED = [[1, 2, 3, 4], [5, 6, 7], [8, 9], [1, 1]]
CONFIG = SimpleNamespace(num_layers=6, intermediate_size=640)


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    folder = save_random_checkpoint("qwen3", tmp_path_factory.mktemp("same"))
    return LLM(folder, num_blocks=64, max_num_seqs=8, device="cpu")


def made_up(device: str = "cuda", dtype: torch.dtype = torch.float32) -> Any:
    """The attributes of an LLM that a comparison reads."""
    decoder = SimpleNamespace(device=torch.device(device), dtype=dtype, config=CONFIG)
    return SimpleNamespace(engine=SimpleNamespace(decoder=decoder))


def compare(found: list[list[int]], apart: float = 2e-5, llm: Any = None) -> TokenComparison:
    """With logits that differ by ``apart`` from token to token, the largest of which is 8."""
    workload = Workload("w", [[7], [7, 7], [7], [7]], [SamplingParams(temperature=0)] * 4, 0)

    def next_logits(token_ids: list[int]) -> Tensor:
        index = next(i for i, prompt in enumerate(workload.prompts) if token_ids[: len(prompt)] == prompt)
        assert token_ids[0] == 7 and len(token_ids) < len(workload.prompts[index]) + 4
        return 8.0 - apart * torch.arange(VOCAB, dtype=torch.float64)

    return compare_tokens(llm or made_up(), workload, EXPECTED, [EXPECTED, found], next_logits)


def test_equal_tokens_are_the_same_and_nothing_is_computed() -> None:
    comparison = compare_tokens(made_up(), Workload("w", [], [], 0), EXPECTED, [EXPECTED])
    assert comparison == TokenComparison(4) and comparison.is_same and comparison.is_right


def test_a_near_tie_is_reported_with_its_margin_and_is_not_fatal() -> None:
    comparison = compare([[1, 2, 4, 9], *EXPECTED[1:]])
    assert comparison.num_differing == 1 and comparison.margins == [pytest.approx(2e-5, rel=0.1)]
    assert not comparison.is_same and comparison.is_right
    assert comparison.margin_bound == pytest.approx(2 * math.sqrt(7 * 6 * 640) * 2**-24 * 8)
    assert "1 of 4 requests differs" in comparison.line() and "a near tie" in comparison.line()


def test_an_error_is_fatal_if_it_is_in_one_token_of_one_request() -> None:
    comparison = compare([[1, 2, 4, 9], *EXPECTED[1:]], apart=1e-2)
    assert comparison.num_differing == 1 and not comparison.is_right
    assert "more than near ties" in comparison.line()


@pytest.mark.parametrize("num_differing", [MAX_DIFFERING, MAX_DIFFERING + 1])
def test_near_ties_are_rare(num_differing: int) -> None:
    found = [[ids[0] - 1, *ids[1:]] if index < num_differing else ids for index, ids in enumerate(EXPECTED)]
    comparison = compare(found)
    assert comparison.num_differing == num_differing
    assert comparison.is_right is (num_differing <= MAX_DIFFERING)


def test_missing_tokens_and_logits_that_are_no_numbers_are_no_near_ties() -> None:
    assert compare([EXPECTED[0][:-1], *EXPECTED[1:]]).margins == [math.inf]
    assert not compare([EXPECTED[0][:-1], *EXPECTED[1:]]).is_right
    assert not compare([[0, *EXPECTED[0][1:]], *EXPECTED[1:]], apart=math.nan).is_right


def test_a_cpu_allows_none_and_another_dtype_is_not_judged() -> None:
    found = [[1, 2, 4, 9], *EXPECTED[1:]]
    on_cpu = compare(found, llm=made_up("cpu"))
    assert on_cpu.margins and not on_cpu.is_right and "an error on a CPU" in on_cpu.line()
    half = compare(found, llm=made_up(dtype=torch.bfloat16))
    assert half.num_differing == 1 and not half.margins and half.line() == "1 of 4 requests differs"


def test_the_margin_of_a_seeded_draw_counts_its_noise(llm: LLM) -> None:
    prompt, params = [5, 6, 7], SamplingParams(temperature=0.7, seed=3, max_tokens=4, ignore_eos=True)
    token_ids = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
    for place, token in enumerate(token_ids):
        before = prompt + token_ids[:place]
        logits = decoder_logits(llm)(before)
        scores = scores_of(logits, list(range(len(logits))), params, len(before))
        assert scores.index(max(scores)) == token
    assert all(map(math.isnan, scores_of(logits, [1, 2], replace(params, seed=None), 3)))


def test_the_views_of_the_reference_agree_and_rounding_stays_below_its_bound() -> None:
    """A tie takes four rounding errors: two logits, in two runs. A bound far above them would accept real errors."""
    llm = LLM(device="cpu", num_blocks=64, max_num_seqs=4)
    ids = [(37 * n) % 1000 for n in range(150)]
    system = transformers_peers(llm)["transformers"]
    ours, theirs = decoder_logits(llm)(ids), system.next_logits(ids)
    with torch.no_grad():
        exact = system.model.double()(torch.tensor([ids])).logits[0, -1]
    error = max(float((logits - exact).abs().max()) for logits in (ours, theirs))
    bound = margin_bound(llm.engine.decoder.config, float(exact.abs().max()))
    assert 4 * error < bound < 100 * error


def entry(name: str, comparison: TokenComparison | None) -> Entry:
    run = Run([[1]], [], 1.0)
    return Entry.of(name, [run], Workload("w", [], [], 0), None, same_counts=True, compared=comparison)


def test_the_reports_exit_status_follows_the_rule_and_the_table_shows_it(capsys) -> None:
    tie = TokenComparison(4, 1, [2e-5], 1e-3, allows_near_ties=True)
    wrong = replace(tie, margins=[0.5])
    for comparison, is_right, cell in ((tie, True, "near ties"), (wrong, False, "NO")):
        entries = [entry("transformers", TokenComparison(4)), entry(ENGINE, comparison)]
        report = SpeedReport("throughput", "m", "float32", entries=entries)
        assert report.is_right is is_right
        print_speed(report)
        shown = capsys.readouterr().out
        assert cell in shown and f"{ENGINE}: {comparison.line()}" in shown


def test_a_ladder_with_a_near_tie_is_stored_drawn_and_right(llm: LLM, tmp_path, monkeypatch) -> None:
    """The margin is that of transformers' logits. The tie is planted, and the bound is moved above it."""
    workload = random_lengths(llm, num_requests=3, shortest=3, longest=9, seed=1)
    peers = transformers_peers(llm)

    def other(workload: Workload) -> Any:
        run = watched_engine(llm)(workload)
        run.token_ids[1][2] ^= 1
        return run

    seen = []

    def compare(*arguments: Any) -> TokenComparison:
        seen.append(arguments[-1])
        found = compare_tokens(*arguments)
        return replace(found, allows_near_ties=True, margin_bound=max(found.margins, default=0.0))

    monkeypatch.setattr(measure, "compare_tokens", compare)
    systems = {ENGINE: other, "transformers": peers["transformers"]}
    report = run_ladder(llm, systems, workload, warm_up=False)
    assert seen[-1] == peers["transformers"].next_logits
    assert report.is_right and not report[ENGINE].same_tokens and report[ENGINE].compared.num_differing == 1
    assert "near ties" in ladder_figure(report).get_suptitle()
    report.save(tmp_path / "ladder.json")
    stored = Ladder.read(tmp_path / "ladder.json")
    assert stored[ENGINE].compared == report[ENGINE].compared and stored.is_right


def test_throughput_is_held_to_the_same_rule(llm: LLM, monkeypatch) -> None:
    workload = random_lengths(llm, num_requests=3, shortest=3, longest=9, seed=1)

    def other(asked: Workload) -> Any:
        run = watched_engine(llm)(asked)
        run.token_ids[0][0] ^= 1
        return run

    bench = Bench(llm, Roofline(1e9, 1e9, 1e10), 1)
    systems = {"eager": watched_engine(llm), "+ graphs": other}
    assert not bench.throughput(systems, workload, "optimisations").is_right  # here, on a CPU
    allowed = replace(TokenComparison(3, 1, [1e-6], 1e-5), allows_near_ties=True)
    monkeypatch.setattr(measure, "compare_tokens", lambda *_: allowed)
    report = bench.throughput(systems, workload, "optimisations")
    assert report.is_right and report["+ graphs"].compared == allowed
