"""The roof is measured, and the floors under a step follow from it by formulas."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from itertools import count

import pytest
import torch

from paged_infer.bench import roofline, timing
from paged_infer.bench.roofline import Roofline, measure
from paged_infer.bench.timing import Timing, time_calls, time_cuda_graph, time_on

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def small_cpu():
    """Sizes for a test, not for a measurement: caches may hold them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "CPU_BUFFER_BYTES", 2**24)
        patch.setattr(roofline, "CPU_MATMUL_SIZE", 256)
        return measure("cpu")


# -- The roof


def test_rates_of_this_machine_are_rates(small_cpu):
    rates = (small_cpu.copy_bytes_per_s, small_cpu.read_bytes_per_s, small_cpu.matmul_flops_per_s)
    assert all(0 < rate < math.inf for rate in rates)
    assert (small_cpu.matmul_dtype, small_cpu.device) == ("float32", "cpu")


def test_rates_are_what_was_moved_over_the_median_time(monkeypatch):
    seconds = count(1)  # 1 s for the copy, 2 and 3 for the reads, 4 for the matmul
    monkeypatch.setattr(roofline, "time_on", lambda *_, **__: Timing((float(next(seconds)),), "clock"))
    monkeypatch.setattr(roofline, "CPU_BUFFER_BYTES", 2**16)
    monkeypatch.setattr(roofline, "CPU_MATMUL_SIZE", 10)
    measured = measure("cpu", dtype=torch.float64)
    assert measured == Roofline(2 * 2**16 / 1, 2**16 / 2, 2 * 10**3 / 4, "float64", "cpu")


def test_buffers_are_larger_than_any_cache():
    assert roofline.CUDA_BUFFER_BYTES >= 2**30
    assert roofline.CPU_BUFFER_BYTES >= 2**28


def test_measuring_leaves_the_seed_where_it_was(monkeypatch):
    monkeypatch.setattr(roofline, "time_on", lambda *_, **__: Timing((1.0,), "clock"))
    monkeypatch.setattr(roofline, "CPU_BUFFER_BYTES", 2**16)
    before = torch.random.get_rng_state()
    measure("cpu")
    assert torch.equal(torch.random.get_rng_state(), before)


# -- The floors


def test_a_decode_step_reads_every_weight_and_every_cached_key_once():
    roof = Roofline(copy_bytes_per_s=4e12, read_bytes_per_s=3e12, matmul_flops_per_s=8e14)
    layers, kv_heads, head_dim, num_bytes, contexts = 28, 8, 128, 2, [1000, 3000]
    kv_bytes = 2 * layers * kv_heads * head_dim * num_bytes * sum(contexts)
    assert kv_bytes == 458_752_000
    assert roof.decode_floor_s(weight_bytes=1.2e9, kv_bytes=kv_bytes) == (1.2e9 + 458_752_000) / 4e12


def test_a_prompt_takes_its_operations_over_the_matmul_rate():
    roof = Roofline(4e12, 3e12, 8e14)
    assert roof.prefill_floor_s(2 * 0.6e9 * 2048 + 1e12) == (2 * 0.6e9 * 2048 + 1e12) / 8e14


def test_the_bandwidth_of_a_floor_is_the_better_of_copying_and_reading():
    assert Roofline(4.0, 3.0, 8.0).bandwidth_bytes_per_s == 4.0
    assert Roofline(3.0, 5.0, 8.0).bandwidth_bytes_per_s == 5.0
    assert Roofline(4.0, 3.0, 8.0).ridge_flops_per_byte == 2.0


def test_a_roofline_survives_its_json(small_cpu, tmp_path):
    small_cpu.save(tmp_path / "deep" / "roofline.json")
    assert Roofline.read(tmp_path / "deep" / "roofline.json") == small_cpu
    assert json.loads(json.dumps(asdict(small_cpu))) == asdict(small_cpu)


# -- The clock


def test_the_clock_gives_the_median_of_the_calls_after_warm_up(monkeypatch):
    ticks = iter([0.0, 1.0, 10.0, 15.0, 20.0, 22.0])  # calls of 1, 5 and 2 seconds
    monkeypatch.setattr(timing, "perf_counter", lambda: next(ticks))
    calls = []
    timed = time_calls(lambda: calls.append(1), repeats=3, warm_up=2)
    assert timed == Timing((1.0, 5.0, 2.0), "clock")
    assert timed.median_s == 2.0
    assert len(calls) == 5


def test_a_cpu_is_timed_by_the_clock():
    assert time_on("cpu", lambda: None, repeats=2).method == "clock"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_the_graph_timer_says_what_to_use_without_a_gpu():
    with pytest.raises(RuntimeError, match="time_calls times the CPU"):
        time_cuda_graph(lambda: None)


# -- The GPU's events


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("flush_l2", [True, False])
def test_a_replayed_graph_takes_its_time_and_more_for_more_work(flush_l2):
    small, large = (torch.ones(n, device="cuda") for n in (2**20, 2**28))
    short = time_cuda_graph(lambda: small.mul_(1.0), flush_l2=flush_l2, repeats=5)
    long = time_cuda_graph(lambda: large.mul_(1.0), flush_l2=flush_l2, repeats=5)
    assert short.method == long.method == "cuda graph"
    assert len(short.samples_s) == 5
    assert 0 < short.median_s < long.median_s < 1.0


@pytest.mark.gpu
@needs_cuda
def test_a_gpu_copies_and_reads_at_like_rates_and_multiplies_faster_in_bfloat16():
    roof = measure("cuda")
    assert roof.matmul_dtype == "bfloat16"
    assert 0.5 < roof.read_bytes_per_s / roof.copy_bytes_per_s < 2.0
    assert roof.matmul_flops_per_s > roof.bandwidth_bytes_per_s
    assert roof.device == torch.cuda.get_device_name()
