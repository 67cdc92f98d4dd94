"""The pool gets what measured numbers leave; what is run to measure them runs here too, on a meter that is made up."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from paged_infer.cli.info import profile_rows
from paged_infer.config import EngineConfig
from paged_infer.execution import memory_profile
from paged_infer.execution.memory_plan import plan_memory
from paged_infer.execution.memory_profile import (
    CAPTURE_WORKSPACE_BYTES,
    DRIVER_BYTES_PER_GRAPH,
    MemoryProfile,
    MemoryProfiler,
    max_num_batched_tokens,
)
from paged_infer.kernels.attention_backends import torch_backend
from paged_infer.kernels.op_sets import TORCH_OPS

MIB = 2**20
GIB = 2**30
PROFILE = MemoryProfile(
    total=80 * GIB,
    free=79 * GIB,
    gpu_memory_utilization=0.9,
    weights=16 * GIB,
    activations=2 * GIB,
    logits=GIB,
    graphs=GIB,
)


class MadeUpMeter:
    """An 80 GiB device on which whatever is run takes one more MiB than what was run before."""

    def __init__(self) -> None:
        self.in_tensors, self.num_runs = 5 * MIB, 0

    def free_and_total(self) -> tuple[int, int]:
        return 79 * GIB, 80 * GIB

    def allocated(self) -> int:
        return self.in_tensors

    def peak_of(self, run: Callable[[], object]) -> int:
        run()
        self.num_runs += 1
        return self.num_runs * MIB


def changed(**numbers: float) -> MemoryProfile:
    return MemoryProfile(**{**{n: getattr(PROFILE, n) for n in PROFILE.__slots__}, **numbers})


def test_the_room_is_the_share_less_everything_that_was_measured() -> None:
    assert PROFILE.budget == 72 * GIB and PROFILE.available_kv_bytes == 52 * GIB
    for name in ("weights", "activations", "logits", "graphs"):
        assert changed(**{name: getattr(PROFILE, name) + MIB}).available_kv_bytes == PROFILE.available_kv_bytes - MIB, (
            name
        )


def test_what_others_hold_bounds_the_share_and_no_room_is_never_less_than_none() -> None:
    assert changed(free=30 * GIB).available_kv_bytes == 10 * GIB
    assert changed(free=71 * GIB).available_kv_bytes == PROFILE.available_kv_bytes - GIB
    assert changed(free=20 * GIB - 1).available_kv_bytes == 0
    # Two engines with half of nine tenths each: the second finds what the first has left.
    assert changed(gpu_memory_utilization=0.45, free=43 * GIB).available_kv_bytes == 16 * GIB


@pytest.mark.parametrize("max_num_seqs", [3, 8])
@pytest.mark.parametrize("max_num_batched_tokens", [1, 7, 64, 65, 128, None])
def test_every_line_is_measured_by_running_what_needs_it(
    max_num_seqs, max_num_batched_tokens, make_llm, monkeypatch
) -> None:
    monkeypatch.setattr(memory_profile, "_default_num_batched_tokens", lambda device: 96)
    decoder = make_llm().engine.decoder
    config = EngineConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, max_model_len=64)
    steps: list[tuple[int, int]] = []
    forward = decoder.forward
    decoder.forward = lambda ids, cache, step: steps.append((len(ids), len(step.seq_lens))) or forward(ids, cache, step)
    try:
        meter = MadeUpMeter()
        profiler = MemoryProfiler.start(meter)
        meter.in_tensors += 100 * MIB  # the weights
        profile = profiler.finish(config, decoder, torch_backend, TORCH_OPS, has_graphs=True)
    finally:
        del decoder.forward
    num_tokens = max_num_batched_tokens or 96
    assert steps[0] == (num_tokens, -(-num_tokens // 64))
    assert steps[1] == (max_num_seqs, max_num_seqs)  # the largest graph first
    num_graphs = len(steps) - 1
    assert (profile.weights, profile.activations, profile.logits) == (100 * MIB, MIB, 2 * MIB)
    assert profile.graphs == 3 * MIB + num_graphs * DRIVER_BYTES_PER_GRAPH + CAPTURE_WORKSPACE_BYTES
    without = MemoryProfiler.start(meter).finish(config, decoder, torch_backend, TORCH_OPS, has_graphs=False)
    assert without.graphs == 0


@pytest.mark.parametrize(
    ("device", "total", "expected"),
    [("cpu", None, 2048), ("cuda", 24, 2048), ("cuda:1", 69, 2048), ("cuda", 70, 8192), ("cuda", 139, 8192)],
)
def test_steps_are_large_by_default_where_there_is_room(device, total, expected, monkeypatch) -> None:
    def properties(asked: torch.device) -> SimpleNamespace:
        assert asked == torch.device(device)
        return SimpleNamespace(total_memory=total * GIB)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert max_num_batched_tokens(EngineConfig(), torch.device(device)) == expected
    assert max_num_batched_tokens(EngineConfig(max_num_batched_tokens=300), torch.device(device)) == 300


@pytest.mark.parametrize(("option", "expected"), [(None, 96), (70, 70)])
def test_the_scheduler_gets_the_default_of_the_device(option, expected, make_llm, monkeypatch) -> None:
    monkeypatch.setattr(memory_profile, "_default_num_batched_tokens", lambda device: 96)
    engine = make_llm(max_num_batched_tokens=option).engine
    assert engine.memory.max_num_batched_tokens == engine.scheduler.max_num_batched_tokens == expected
    with pytest.raises(ValueError, match=f"max_num_batched_tokens={expected} is less than max_model_len=128"):
        make_llm(max_num_batched_tokens=option, scheduling_policy="static", max_model_len=128)


def test_the_pool_holds_the_crowd_or_what_there_is_room_for(make_llm) -> None:
    decoder = make_llm().engine.decoder
    config = EngineConfig(max_num_seqs=4, max_model_len=64)
    per_block = 16 * sum(layer.bytes_per_token for layer in decoder.kv_spec())
    assert plan_memory(config, decoder, PROFILE).num_blocks == 4 * 4
    tight = changed(free=20 * GIB + 5 * per_block + 1)
    plan = plan_memory(config, decoder, tight)
    assert plan.num_blocks == 5 and plan.profile is tight
    with pytest.raises(ValueError, match=rf"one block of {per_block} bytes does not fit in the {per_block - 1}"):
        plan_memory(config, decoder, changed(free=20 * GIB + per_block - 1))


def test_info_prints_the_lines_and_they_add_up() -> None:
    rows = profile_rows(PROFILE, 2048, 256)
    numbers = [float(text.split(" MiB")[0].split()[-1].replace(",", "")) for text in rows.values()]
    budget = float(rows["GPU memory"].split(": ")[-1].removesuffix(" MiB").replace(",", ""))
    assert budget - sum(numbers[1:5]) == numbers[5] == 52 * 1024
    assert "0.9 x 81,920.0 MiB" in rows["GPU memory"] and "2,048 tokens" in rows["- activations"]
