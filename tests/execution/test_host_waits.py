"""Launching a step does not make the host wait for the device, whatever the step holds; on a stand-in for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captured import call_again, with_graphs
from fake_gpu import FakeGpu, gpu_fixture  # noqa: F401

from paged_infer import LLM, SamplingParams
from paged_infer.cache.paged import PagedCache
from paged_infer.control.step import SamplingRow, ScheduledSequence, ScheduledStep
from paged_infer.execution.model_runner import ModelRunner
from paged_infer.kernels.attention_backends import triton_backend
from paged_infer.kernels.device import to_device
from paged_infer.kernels.op_sets import TRITON_OPS
from paged_infer.params import BeamSearchParams
from paged_infer.sampling import sampler
from paged_infer.sampling.sampler import Sampler, copy_to_host

PROMPTS = [[8, 9, 8, 9, 8], [9] * 6, [11, 12], list(range(20, 33)), [3], [5, 6, 7]]
USUAL: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True}
PARAMS = [
    SamplingParams(temperature=0, **USUAL),
    SamplingParams(temperature=0.9, seed=4, n=3, **USUAL),
    SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1, **USUAL),
    SamplingParams(temperature=0.8, seed=1, repetition_penalty=1.3, frequency_penalty=0.2, **USUAL),
    SamplingParams(temperature=0.8, seed=2, logit_bias={7: 4.0}, min_tokens=3, stop_token_ids=[7], max_tokens=6),
    SamplingParams(temperature=0.8, seed=3, min_p=0.05, **USUAL),
]


@pytest.fixture
def make_one_layer(make_llm: Callable[..., LLM]) -> Callable[..., LLM]:
    """Engines of one layer, as kernels are interpreted."""

    def make(**options: Any) -> LLM:
        llm = make_llm(**options)
        llm.engine.decoder.layers = llm.engine.decoder.layers[:1]
        return llm

    return make


def on_gpu(llm: LLM, gpu: FakeGpu) -> LLM:
    """Move the engine's model and cache to the stand-in, where no launch may wait."""
    engine = llm.engine
    gpu.move(engine.decoder)
    for linear in (engine.decoder.head, *(linear for _, linear in engine.decoder.linears())):
        linear.product = None  # packed for a CPU
    memory = engine.memory
    cache = PagedCache(
        engine.decoder.kv_spec(),
        *(memory.num_blocks, memory.block_size, triton_backend, "cuda", TRITON_OPS),
        num_swap_blocks=memory.num_swap_blocks,
    )
    runner = ModelRunner(engine.decoder, cache, Sampler(TRITON_OPS.sample, TRITON_OPS.argmax))
    launch = runner.launch

    def watched(step: Any) -> Any:
        with gpu.no_waiting():
            return launch(step)

    runner.launch = watched  # type: ignore[method-assign]
    engine.executor.runner = runner
    return llm


def tokens_of(llm: LLM, params: list[SamplingParams]) -> list[Any]:
    """Tokens, and the tokens whose logprobs are reported. Requests arrive two steps apart, so prompts meet decodes."""
    outputs: dict[str, Any] = {}
    waiting = [(str(i), prompt, own) for i, (prompt, own) in enumerate(zip(PROMPTS, params, strict=True))]
    while waiting or llm.engine.has_unfinished_requests:
        if waiting:
            llm.engine.add_request(*waiting.pop(0))
        for _ in range(2):
            outputs |= {output.request_id: output for output in llm.engine.step().outputs}
    llm.check_integrity()
    return [
        [(one.token_ids, one.finish_reason, [[*place] for place in one.logprobs or ()]) for one in outputs[i].outputs]
        for i in sorted(outputs)
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "eager": {"async_scheduling": True},
    "graphs": {"async_scheduling": True, "max_num_seqs": 4},
    "swapping": {"async_scheduling": True, "preemption_mode": "swap", "num_blocks": 9},
    "drafts": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 1}},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_no_launch_waits(case: str, make_one_layer: Callable[..., LLM], gpu: FakeGpu, monkeypatch) -> None:
    monkeypatch.setattr(PagedCache, "swap_out", allowed_to_wait(PagedCache.swap_out, gpu))
    options = {"max_num_batched_tokens": 8, "block_size": 4, **OPTIONS[case]}
    expected = tokens_of(make_one_layer(attention_backend="torch", **options), PARAMS)
    llm = on_gpu(make_one_layer(attention_backend="triton", **options), gpu)
    if case == "graphs":
        with_graphs(llm, call_again)
    assert tokens_of(llm, PARAMS) == expected
    stats = llm.stats()
    assert case != "graphs" or llm.engine.executor.runner.graphs.num_replays > 2
    assert case != "swapping" or stats["blocks_swapped_in"]
    assert case != "drafts" or stats["num_draft_tokens"]
    assert stats["blocks_copied"]


def test_the_candidates_of_top_k_and_top_p_are_all_that_a_launch_waits_for(
    make_one_layer: Callable[..., LLM], gpu: FakeGpu, monkeypatch
) -> None:
    cut = [
        SamplingParams(temperature=0.8, seed=5, top_k=5, **USUAL),
        SamplingParams(temperature=0.9, seed=6, top_p=0.8, **USUAL),
        BeamSearchParams(beam_width=2, max_tokens=4),
    ]
    options = {"max_num_batched_tokens": 8, "block_size": 4}
    expected = tokens_of(make_one_layer(attention_backend="torch", **options), [*PARAMS[:3], *cut])
    llm = on_gpu(make_one_layer(attention_backend="triton", **options), gpu)
    for params in cut[:2]:
        with pytest.raises(AssertionError, match="the host waits for the device: nonzero"):
            llm.engine.executor.runner.launch(a_step(params))
    monkeypatch.setattr(sampler, "_draw_again", allowed_to_wait(sampler._draw_again, gpu))
    assert tokens_of(llm, [*PARAMS[:3], *cut]) == expected


def a_step(params: SamplingParams) -> ScheduledStep:
    return ScheduledStep(0, [ScheduledSequence(0, [5, 6], 0, [0], SamplingRow(params, 1, 0, 2, 0))])


def allowed_to_wait(function: Callable[..., Any], gpu: FakeGpu) -> Callable[..., Any]:
    def allowed(*args: Any, **kwargs: Any) -> Any:
        with gpu.waiting():
            return function(*args, **kwargs)

    return allowed


def test_the_stand_in_finds_what_makes_the_host_wait(gpu: FakeGpu) -> None:
    x = torch.tensor([[1.0, 5.0], [3.0, 2.0]], device="cuda")
    mask, pinned = x > 2, torch.ones(2, dtype=torch.int64).pin_memory()
    waits: list[Callable[[], object]] = [
        lambda: x.tolist(),
        lambda: x.sum().item(),
        lambda: float(x.sum()),
        lambda: "larger" if mask.any() else "smaller",
        lambda: x.cpu(),
        lambda: x.to("cpu"),
        lambda: x[[0]],
        lambda: x[np.array([0])],
        lambda: x[torch.tensor([0])],
        lambda: x[pinned],
        lambda: x[torch.zeros((), dtype=torch.int64, device="cuda")],
        lambda: x[mask],
        lambda: x.__setitem__(mask, x[0].clone()),
        lambda: x.__setitem__(0, torch.ones(2)),
        lambda: mask.nonzero(),
        lambda: x.masked_select(mask),
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: torch.ones(2).to("cuda"),
        lambda: torch.ones(2).to("cuda", non_blocking=True),
        lambda: pinned.to("cuda"),
        lambda: torch.empty(2, 2).copy_(x, non_blocking=True),
        lambda: x.copy_(torch.empty(2, 2)),
    ]
    for wait in waits:
        wait()
        with gpu.no_waiting(), pytest.raises(AssertionError, match="the host waits for the device"):
            wait()
    with pytest.raises(RuntimeError, match="on the same device"):
        x + torch.ones(2)


def test_what_does_not_wait_computes_on_the_stand_in(gpu: FakeGpu) -> None:
    x = torch.zeros(2, 2, device="cuda")
    with gpu.no_waiting():
        x[to_device(torch.tensor([1]), x.device)] = 3.0
        x[x > 2] = 4.0
        x[0, :1] -= 1
        row = copy_to_host(x[1], x[1])
        assert row.host.tolist() != [4.0, 4.0]  # it has not arrived
        x.fill_(7.0)
    assert row.token_ids() == [4.0, 4.0]
    assert x.device == torch.device("cuda:0") and x.tolist() == [[7.0, 7.0]] * 2
