"""``bench policies`` and ``bench arrival``: one trace for all, and who stands still is told from who does not."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from paged_infer import LLM
from paged_infer.bench.load import EngineSystem, poisson_arrivals, serve
from paged_infer.bench.metrics import quantile
from paged_infer.bench.scheduling.arrival import ArrivalReport, run_arrival
from paged_infer.bench.scheduling.policies import COST, PoliciesReport, PolicyOptions, run_policies, simulated
from paged_infer.cli import app
from paged_infer.control.step import ScheduledSequence, ScheduledStep
from paged_infer.simulation.costs import LinearCost
from paged_infer.simulation.workloads import WorkloadRequest


@pytest.fixture(scope="module")
def report() -> PoliciesReport:
    return run_policies(True, 120, 10.0, 128, None, [0.0, 0.5], 0)


@pytest.fixture(scope="module")
def arrival() -> ArrivalReport:
    return run_arrival(True, 8, 4096, [128, 512])


def one_step_s(num_tokens: int) -> float:
    return COST.seconds(ScheduledStep(1, [ScheduledSequence(0, [0] * num_tokens, 0, [], None)]))


def test_decodes_starve_under_prefill_first_without_a_delay_and_nowhere_else(report):
    starved = report["prefill_first, delay 0"].longest_stall_s
    largest_step_s = one_step_s(2048)
    assert starved > 4 * largest_step_s
    for policy in report.policies:
        if policy.name != "prefill_first, delay 0":
            assert policy.longest_stall_s < 1.2 * largest_step_s, policy.name


def test_no_gap_of_chunked_is_longer_than_its_step(report):
    chunked = report["chunked"]
    assert chunked.longest_stall_s <= one_step_s(chunked.max_num_batched_tokens) + 1e-9


def test_a_static_batch_pays_before_its_second_token_and_not_later(report):
    static = report["static"]
    assert static.longest_start_s > 10 * static.longest_stall_s


def test_chunked_loses_no_throughput_to_prefill_first(report):
    assert report["chunked"].tokens_per_s > 0.95 * report["prefill_first, delay 0"].tokens_per_s
    assert report["chunked"].tokens_per_s > report["static"].tokens_per_s


def test_the_same_seed_gives_the_same_report_and_its_json_too(report, tmp_path):
    assert run_policies(True, 120, 10.0, 128, None, [0.0, 0.5], 0) == report
    assert run_policies(True, 120, 10.0, 128, None, [0.0, 0.5], 1).policies != report.policies
    report.save(tmp_path / "policies.json")
    assert PoliciesReport.read(tmp_path / "policies.json") == report


def test_every_policy_serves_every_token_of_every_request():
    arrivals = poisson_arrivals(30, 20.0, (1, 60), (1, 20), seed=4)
    for policy in ("static", "dynamic", "prefill_first", "chunked"):
        times = serve(simulated(PolicyOptions(policy, policy, 128), COST, 8, 128), arrivals)
        assert [len(one.token_s) for one in times] == [one.num_output for one in arrivals]
        assert all(one.token_s == sorted(one.token_s) and one.ttft_s > 0 for one in times)


def test_the_clock_moves_by_what_steps_cost_and_waits_for_who_comes():
    arrivals = [WorkloadRequest(0.0, 10, 3), WorkloadRequest(5.0, 4, 1)]
    first, second = serve(simulated(PolicyOptions("chunked", "chunked", 64), LinearCost(1.0, 0.01), 4, 64), arrivals)
    assert first.token_s == pytest.approx([1.10, 2.11, 3.12])
    assert second.token_s == pytest.approx([6.04])


def test_an_engine_is_served_the_same_trace(make_llm):
    llm: LLM = make_llm(max_num_batched_tokens=64, max_model_len=64)
    arrivals = poisson_arrivals(6, 500.0, (3, 20), (2, 6), seed=1)
    times = serve(EngineSystem(llm.engine), arrivals)
    assert [len(one.token_s) for one in times] == [one.num_output for one in arrivals]
    llm.check_integrity()


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.25, 1), (0.26, 2), (0.5, 2), (1.0, 4)])
def test_a_quantile_is_one_of_the_numbers(share, expected):
    assert quantile([1, 2, 3, 4], share) == expected


def test_a_long_prompt_stops_decodes_whole_and_only_slows_them_in_chunks(arrival):
    whole, small, large = arrival.runs
    assert whole.longest_gap_s > one_step_s(4096)
    assert small.longest_gap_s <= one_step_s(128) + 1e-9
    assert large.longest_gap_s <= one_step_s(512) + 1e-9
    assert whole.ttft_s < large.ttft_s < small.ttft_s  # what chunks cost: the prompt itself waits longer
    assert [run.usual_gap_s for run in arrival.runs] == pytest.approx([one_step_s(8)] * 3)


def test_an_arrival_survives_its_json(arrival, tmp_path):
    arrival.save(tmp_path / "arrival.json")
    assert ArrivalReport.read(tmp_path / "arrival.json") == arrival


@pytest.mark.parametrize("command", ["policies", "arrival"])
def test_the_commands_write_a_picture_and_its_numbers(command, tmp_path):
    result = CliRunner().invoke(app, ["bench", command, "--simulate", "--figures", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / f"bench-{command}-simulated.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / f"bench-{command}-simulated.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["arrival", "--chunk-tokens", "8"], ["8 tokens", "16"]),
        (["policies", "--delay", "inf"], ["scheduler_delay_factor=inf"]),
        (["policies", "--num-requests", "1"], ["--num-requests"]),
    ],
)
def test_bad_options_are_one_clear_error(options, words, tmp_path):
    result = CliRunner().invoke(app, ["bench", *options, "--simulate", "--figures", str(tmp_path)])
    assert result.exit_code == 2
    assert all(word in result.output for word in words)
    assert not [*tmp_path.iterdir()]
