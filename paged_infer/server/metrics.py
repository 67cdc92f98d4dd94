"""Prometheus metrics with vLLM's names and meanings, so that dashboards made for vLLM work here.

``num_requests_*`` count sequences, as in vLLM: each of ``n`` samples counts. ``gpu_cache_usage_perc`` and
``num_requests_swapped`` are names of vLLM V0 (V1 has ``kv_cache_usage_perc``, and does not swap).
Names that begin with ``paged_infer:`` are not vLLM's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from paged_infer.async_llm import AsyncLLM, StepReport
from paged_infer.control.sequence import Sequence
from paged_infer.outputs import RequestOutput

M = TypeVar("M", Counter, Histogram)
LABELS = ("model_name", "engine")
OURS = "paged_infer"
GAPS = "inter_token_latency_seconds"
TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
LATENCY_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
LOOP_DELAY_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1, 2)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

_GAUGES = {  # name -> (help text, its value from LLMEngine.stats())
    "num_requests_running": ("Running sequences.", lambda s: s["num_running"]),
    "num_requests_waiting": ("Waiting sequences, including preempted ones.", lambda s: s["num_waiting"]),
    "num_requests_swapped": ("Sequences swapped out to CPU memory.", lambda s: s["num_swapped"]),
    "kv_cache_usage_perc": ("Share of the KV blocks in use, from 0 to 1.", lambda s: _usage(s)),
    "gpu_cache_usage_perc": ("The older name of kv_cache_usage_perc.", lambda s: _usage(s)),
}
_COUNTERS = {  # name -> (help text, its key in LLMEngine.stats())
    "vllm:prefix_cache_queries": ("Tokens looked up in the prefix cache.", "prefix_query_tokens"),
    "vllm:prefix_cache_hits": ("Tokens found in the prefix cache.", "prefix_hit_tokens"),
    "vllm:spec_decode_num_drafts": ("Drafts: one per sequence and step.", "num_drafts"),
    "vllm:spec_decode_num_draft_tokens": ("Draft tokens.", "num_draft_tokens"),
    "vllm:spec_decode_num_accepted_tokens": ("Accepted draft tokens.", "num_accepted_tokens"),
    "vllm:num_preemptions": ("Preemptions of sequences.", "preemptions"),
    "paged_infer:all_reduces": ("Sums over ranks.", "all_reduces"),
    "paged_infer:all_gathers": ("Tensors gathered from all ranks.", "all_gathers"),
    "paged_infer:collective_bytes": ("Bytes that one rank handed to either.", "collective_bytes"),
}


def _usage(stats: dict[str, int | float]) -> float:
    return 1 - stats["free_blocks"] / stats["num_blocks"]


class Metrics:
    """Observes an engine: counters and histograms on its thread after each step, the rest when they are scraped.

    The label ``engine`` is the number of a replica (``AsyncLLM(data_parallel_size=...)``), as in vLLM.
    """

    def __init__(self, engine: AsyncLLM, model_name: str, cache_config: Mapping[str, str] | None = None) -> None:
        """``cache_config``: what ``vllm:cache_config_info`` shows as labels."""
        self.registry = CollectorRegistry()
        self._engine, self._cache_config = engine, dict(cache_config or {})
        self._labels = [(model_name, str(index)) for index, _ in enumerate(engine.replica_stats())]
        self._last_token_s: dict[str, dict[int, float]] = {}  # request id -> sample index -> time
        counter, histogram = self._counter, self._histogram
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens processed.")
        self._generation_tokens = counter("generation_tokens", "Tokens generated.")
        self._success = Counter(
            "vllm:request_success", "Answers by finish reason.", (*LABELS, "finished_reason"), registry=self.registry
        )
        for labels in self._labels:
            for reason in ("stop", "length", "abort", "error"):
                self._success.labels(*labels, reason)
        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", TTFT_S)
        self._gap_family = self._family(GAPS, "From one token to the next.", TPOT_S)
        self._gap = self._each(self._gap_family)
        self._tpot = histogram("request_time_per_output_token_seconds", "Mean gap between its tokens.", TPOT_S)
        self._latency = histogram("e2e_request_latency_seconds", "From arrival to the last token.", LATENCY_S)
        self._reasoning_time = self._each(
            self._family("time_to_reasoning_end_seconds", "From arrival to the end of reasoning.", LATENCY_S, OURS)
        )
        self._ttfc = self._each(
            self._family("time_to_first_content_token_seconds", "Arrival to first content token.", LATENCY_S, OURS)
        )
        self._reasoning_length = self._each(
            self._family("request_reasoning_tokens", "Reasoning tokens of an answer.", TOKENS, OURS)
        )
        self._queue_time = histogram("request_queue_time_seconds", "From arrival to its first step.", LATENCY_S)
        self._prefill_time = histogram("request_prefill_time_seconds", "First step to first token.", LATENCY_S)
        self._decode_time = histogram("request_decode_time_seconds", "First token to last token.", LATENCY_S)
        self._inference_time = histogram("request_inference_time_seconds", "First step to last token.", LATENCY_S)
        self._longest_output = histogram("request_max_num_generation_tokens", "Of its longest answer.", TOKENS)
        self._prompt_length = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._output_length = histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)
        self._step_tokens = histogram("iteration_tokens_total", "Of a step: sampled, and of prompts finished.", TOKENS)
        self.loop_delay = Histogram(
            "paged_infer:event_loop_delay_seconds",
            "Delay of the event loop, sampled.",
            LABELS,
            buckets=LOOP_DELAY_S,
            registry=self.registry,
        ).labels(*self._labels[0])
        self.registry.register(self)
        engine.observers.append(self.observe)

    def _counter(self, name: str, text: str) -> list[Counter]:
        return self._each(Counter(f"vllm:{name}", text, LABELS, registry=self.registry))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> list[Histogram]:
        return self._each(self._family(name, text, buckets))

    def _each(self, family: M) -> list[M]:
        """The metric of each replica."""
        return [family.labels(*labels) for labels in self._labels]

    def _family(self, name: str, text: str, buckets: tuple[float, ...], whose: str = "vllm") -> Histogram:
        return Histogram(f"{whose}:{name}", text, LABELS, buckets=buckets, registry=self.registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at each scrape: metrics that are read from the engine."""
        each = list(zip(self._labels, self._engine.replica_stats(), strict=True))
        for name, (text, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS)
            for labels, stats in each:
                gauge.add_metric(labels, value(stats))
            yield gauge
        for name, (text, key) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=LABELS)
            for labels, stats in each:
                counter.add_metric(labels, stats[key])
            yield counter
        info = InfoMetricFamily("vllm:cache_config", "How keys and values are stored.")
        for _, index in self._labels:
            info.add_metric([], {"engine": index, **self._cache_config})
        yield info
        yield from self._health()
        yield from self._gaps_under_their_older_name()

    def _health(self) -> Iterator[Metric]:
        """Whether each of several replicas is ready, and how often it was replaced."""
        health = self._engine.health() if len(self._labels) > 1 else []
        ready = GaugeMetricFamily("paged_infer:replica_ready", "1 if the replica serves requests.", labels=LABELS)
        restarts = CounterMetricFamily("paged_infer:replica_restarts", "Times it was replaced.", labels=LABELS)
        for labels, one in zip(self._labels, health, strict=False):
            ready.add_metric(labels, one["status"] == "ready")
            restarts.add_metric(labels, one["restarts"])
        if health:
            yield from (ready, restarts)

    def _gaps_under_their_older_name(self) -> Iterator[Metric]:
        name = f"vllm:{GAPS}"
        for metric in self._gap_family.collect():
            older = Metric("vllm:time_per_output_token_seconds", f"The same as {name}.", "histogram")
            older.samples = [sample._replace(name=sample.name.replace(name, older.name)) for sample in metric.samples]
            yield older

    def observe(self, report: StepReport) -> None:
        """Record a step. Called after it, on the engine's thread."""
        i = report.replica
        num_read = sum(self._observe_token(sequence, report.now, i) for sequence in report.grown)
        if report.grown:
            self._prompt_tokens[i].inc(num_read)
            self._generation_tokens[i].inc(len(report.grown))
            self._step_tokens[i].observe(num_read + len(report.grown))
        for output in report.outputs:
            if output.finished:
                self._observe_end(output, i)

    def _observe_token(self, sequence: Sequence, now: float, i: int) -> int:
        """Returns the number of prompt tokens that this token completes: all of them if it is the request's first."""
        num_read = 0
        last_s = self._last_token_s.setdefault(sequence.request_id, {})
        if sequence.sample_index in last_s:
            self._gap[i].observe(now - last_s[sequence.sample_index])
        elif sequence.sample_index == 0:
            self._ttft[i].observe(now - sequence.arrival_time_s)
            num_read = sequence.num_prompt_tokens
        last_s[sequence.sample_index] = now
        return num_read

    def _observe_end(self, output: RequestOutput, i: int) -> None:
        self._last_token_s.pop(output.request_id, None)
        for one in output.outputs:
            self._success.labels(*self._labels[i], one.finish_reason).inc()
            self._output_length[i].observe(len(one.token_ids))
            if one.num_reasoning_tokens is not None:
                self._reasoning_length[i].observe(one.num_reasoning_tokens)
        self._prompt_length[i].observe(len(output.prompt_token_ids))
        self._longest_output[i].observe(max(len(one.token_ids) for one in output.outputs))
        metrics = output.metrics
        scheduled_s, first_s, end_s = (
            metrics.first_scheduled_time_s,
            metrics.first_token_time_s,
            metrics.finished_time_s,
        )
        if scheduled_s is not None and first_s is not None and end_s is not None:
            self._queue_time[i].observe(scheduled_s - metrics.arrival_time_s)
            self._prefill_time[i].observe(first_s - scheduled_s)
            self._decode_time[i].observe(end_s - first_s)
            self._inference_time[i].observe(end_s - scheduled_s)
        for family, seconds in (
            (self._latency, metrics.latency),
            (self._tpot, metrics.tpot),
            (self._reasoning_time, metrics.reasoning_time),
            (self._ttfc, metrics.ttfc),
        ):
            if seconds is not None:
                family[i].observe(seconds)
