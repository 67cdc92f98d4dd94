"""/metrics: vLLM's names, and numbers that add up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from holding import LIMIT_S
from prometheus_client.parser import text_string_to_metric_families
from serving import Served, serving

from paged_infer.async_llm import StepReport
from paged_infer.outputs import CompletionOutput, RequestMetrics, RequestOutput
from paged_infer.server.metrics import Metrics


def samples(served: Served) -> dict[str, float]:
    text = served.http.get("/metrics").text
    return {
        sample.name.removeprefix("vllm:") + sample.labels.get("finished_reason", ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "le" not in sample.labels
    }


def test_the_numbers_add_up_to_what_was_asked() -> None:
    with serving(max_num_seqs=8, num_blocks=64) as served:
        prompt = "The river was wide and cold. " * 8
        first = served.complete(prompt=prompt, max_tokens=5, ignore_eos=True)["usage"]
        again = served.complete(prompt=prompt, max_tokens=9, ignore_eos=True, n=2, stop=[])["usage"]
        ended = served.complete(prompt="Once", max_tokens=50, stop="a", temperature=0)
        served.check_idle()  # answers leave before the books are written: ask behind the last step
        now = samples(served)
        usages = [first, again, ended["usage"]]
        assert now["prompt_tokens_total"] == sum(u["prompt_tokens"] for u in usages)
        assert now["generation_tokens_total"] == sum(u["completion_tokens"] for u in usages)
        assert now["time_to_first_token_seconds_count"] == now["e2e_request_latency_seconds_count"] == 3
        assert now["inter_token_latency_seconds_count"] == 4 + 2 * 8 + ended["usage"]["completion_tokens"] - 1
        assert (now["request_success_totallength"], now["request_success_totalstop"]) == (3, 1)
        cached = again["prompt_tokens_details"]["cached_tokens"]
        assert now["prefix_cache_hits_total"] == cached > 0
        assert now["prefix_cache_queries_total"] == sum(u["prompt_tokens"] for u in usages)
        assert 0 < now["time_to_first_token_seconds_sum"] < now["e2e_request_latency_seconds_sum"]
        queue, prefill, decode, both, whole, first = (
            now[f"{name}_seconds_sum"]
            for name in (
                *(f"request_{part}_time" for part in ("queue", "prefill", "decode", "inference")),
                "e2e_request_latency",
                "time_to_first_token",
            )
        )
        assert queue + prefill <= first < whole  # a token arrives a moment after it is sampled
        assert prefill + decode == pytest.approx(both) and queue + both == pytest.approx(whole)
        assert min(queue, prefill, decode) > 0 and now["request_queue_time_seconds_count"] == 3
        assert now["request_max_num_generation_tokens_sum"] == 5 + 9 + ended["usage"]["completion_tokens"]
        older = {name: value for name, value in now.items() if name.startswith("time_per_output_token_")}
        assert older and all(
            value == now[name.replace("time_per_output_token", "inter_token_latency")]
            for name, value in older.items()
            if not name.endswith("_created")
        )


def test_the_cache_is_described_under_the_name_of_vllm() -> None:
    with serving(max_num_seqs=1, num_blocks=64, block_size=8, kv_cache_dtype="int8") as served:
        text = served.http.get("/metrics").text
    line = next(line for line in text.splitlines() if line.startswith("vllm:cache_config_info{"))
    assert all(label in line for label in ('cache_dtype="int8"', 'block_size="8"', 'num_gpu_blocks="64"'))


def test_gauges_show_who_runs_who_waits_and_how_full_the_pool_is() -> None:
    with serving(max_num_seqs=1, num_blocks=64) as served:
        assert samples(served)["kv_cache_usage_perc"] == samples(served)["num_requests_running"] == 0
        body = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with served.held() as steps:
            with served.http.stream("POST", "/v1/completions", json=body):
                served.until_queued(waiting=1)
                steps.run(3)
                with served.http.stream("POST", "/v1/completions", json=body):
                    served.until_queued(waiting=1)
                    now = samples(served)
                    assert (now["num_requests_running"], now["num_requests_waiting"]) == (1, 1)
                    assert 0 < now["kv_cache_usage_perc"] == now["gpu_cache_usage_perc"] < 1
            served.check_idle()
        now = samples(served)
        assert now["num_requests_running"] == now["num_requests_waiting"] == now["kv_cache_usage_perc"] == 0
        assert now["request_success_totalabort"] == 2
        assert not served.server.config.app.state.metrics._last_token_s  # type: ignore[union-attr]


def test_each_time_is_counted_to_the_part_in_which_it_passed(storyteller) -> None:
    """One that arrived at 1 s, ran from 3 s, had its first token at 3.5 s and ended at 8 s."""
    engine = SimpleNamespace(replica_stats=lambda: [storyteller.stats()], observers=[])
    metrics = Metrics(engine, "storyteller")  # type: ignore[arg-type]
    times = RequestMetrics(1.0, first_scheduled_time_s=3.0, first_token_time_s=3.5, finished_time_s=8.0)
    answer = CompletionOutput(index=0, text="", token_ids=[5] * 10, finish_reason="length")
    output = RequestOutput("one", None, [5], [answer], finished=True, metrics=times)
    metrics.observe(StepReport([output], [], 8.0))
    sums = {
        part: metrics.registry.get_sample_value(
            f"vllm:request_{part}_time_seconds_sum", {"model_name": "storyteller", "engine": "0"}
        )
        for part in ("queue", "prefill", "decode", "inference")
    }
    assert sums == {"queue": 2.0, "prefill": 0.5, "decode": 4.5, "inference": 5.0}


def test_a_budget_of_reasoning_is_served_and_its_clocks_are_metrics() -> None:
    clocks = ("time_to_reasoning_end_seconds", "time_to_first_content_token_seconds")
    with serving(max_num_seqs=8, num_blocks=64, reasoning_parser="deepseek_r1") as served:
        for budget in (0, 5):
            body = {"prompt": "Once", "max_tokens": 20, "temperature": 0, "thinking_token_budget": budget}
            text = served.complete(**body)["choices"][0]["text"]
            assert "</think>" in text and text.startswith("</think>") == (budget == 0)
        served.complete(prompt="Once", max_tokens=9, temperature=0, thinking_token_budget=-1)  # ends in its reasoning
        served.check_idle()
        now = {name.removeprefix("paged_infer:"): value for name, value in samples(served).items()}
        assert now["request_reasoning_tokens_sum"] == 5 + (5 + 5) + 9  # the marker takes five tokens
        assert [now[f"{clock}_count"] for clock in clocks] == [2, 2]
        assert now["time_to_first_token_seconds_count"] == 3
        assert 0 < now[f"{clocks[0]}_sum"] < now[f"{clocks[1]}_sum"] < now["e2e_request_latency_seconds_sum"]
    with serving(max_num_seqs=1, num_blocks=64) as served:
        refused = served.post("/v1/completions", prompt="Once", thinking_token_budget=3)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "thinking_token_budget"
        served.complete(prompt="Once", max_tokens=2)
        served.check_idle()
        assert samples(served)[f"paged_infer:{clocks[1]}_count"] == 0


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_preemptions_are_counted(mode: str) -> None:
    options = {"preemption_mode": mode, "max_num_seqs": 8, "num_blocks": 10, "block_size": 4, "max_model_len": 40}
    with serving(**options) as served:
        with served.held():
            answer = served.begin(prompt=["Once upon a time", "Mia"] * 3, max_tokens=20, ignore_eos=True)
            served.until_queued(waiting=6)
        assert answer.result(LIMIT_S).status_code == 200
        now = samples(served)
        assert now["num_preemptions_total"] == served.engine.stats()["preemptions"] > 0
        assert "num_requests_swapped" in now


def test_drafts_and_those_that_were_accepted_are_counted() -> None:
    config = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with serving(max_num_seqs=8, num_blocks=64, speculative_config=config) as served:
        prompt = "The river was wide and cold. " * 8
        usage = served.complete(prompt=prompt, max_tokens=60, temperature=0, ignore_eos=True)["usage"]
        now, stats = samples(served), served.engine.stats()
        assert now["spec_decode_num_drafts_total"] == stats["num_drafts"] > 0
        assert now["spec_decode_num_draft_tokens_total"] == stats["num_draft_tokens"]
        assert now["spec_decode_num_accepted_tokens_total"] == stats["num_accepted_tokens"] > 0
        assert now["generation_tokens_total"] == usage["completion_tokens"] == 60
        assert now["inter_token_latency_seconds_count"] == 59
