"""The engine on a CUDA device: each optimisation on and off says the same, and nothing is compiled while it serves.

Like the kernels' tests for a GPU it needs no conftest and no checkpoint but the bundled one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from paged_infer import LLM, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NUM_REQUESTS = 13  # no size of a graph
PROMPTS = [[5 + i + 7 * j for j in range(3 + 5 * i)] for i in range(NUM_REQUESTS)]
KINDS: dict[str, list[SamplingParams]] = {
    "greedy": [SamplingParams(temperature=0, max_tokens=20 + i, ignore_eos=True) for i in range(NUM_REQUESTS)],
    "seeded": [
        SamplingParams(temperature=0.9, seed=i, max_tokens=20 + i, ignore_eos=True) for i in range(NUM_REQUESTS)
    ],
    "mixed": [
        SamplingParams(temperature=0.8, top_k=9 * (i % 2), seed=i, max_tokens=15, ignore_eos=True)
        for i in range(NUM_REQUESTS)
    ],
}
OPTIONS: dict[str, Any] = {"device": "cuda", "dtype": "float32", "max_num_seqs": 24, "max_num_batched_tokens": 64}


def said(llm: LLM, params: list[SamplingParams]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    llm = LLM(enforce_eager=True, async_scheduling=False, num_blocks=400, **OPTIONS)
    assert llm.engine.executor.runner.graphs is None
    return {kind: said(llm, params) for kind, params in KINDS.items()}


@pytest.mark.parametrize("ahead", [False, True], ids=["one-by-one", "ahead"])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_each_optimisation_says_what_none_says(eager: bool, ahead: bool, expected) -> None:
    for num_blocks in (400, 30):  # 30: somebody has to give back blocks
        llm = LLM(enforce_eager=eager, async_scheduling=ahead, num_blocks=num_blocks, **OPTIONS)
        assert (llm.engine.executor.runner.graphs is None) == eager
        for kind, params in KINDS.items():
            ours = said(llm, params)
            # Another number of rows is another order of sums: a near tie may fall the other way in a rare request.
            num_other = sum(a != b for a, b in zip(ours, expected[kind], strict=True))
            assert num_other <= (0 if eager and num_blocks == 400 else 1), (kind, num_other)
        llm.check_integrity()


def test_graphs_and_running_ahead_are_what_a_gpu_gets_unless_told_otherwise() -> None:
    llm = LLM(num_blocks=100, **OPTIONS)
    graphs = llm.engine.executor.runner.graphs
    assert graphs is not None and graphs.sizes[-1] == 24 and llm.engine._async_scheduling
    assert graphs.num_bytes > 0


def test_nothing_is_compiled_while_decodes_are_served() -> None:
    # The same prompts again, of the same lengths: none of them may be found in the cache.
    llm = LLM(num_blocks=400, enable_prefix_caching=False, **OPTIONS)
    said(llm, KINDS["greedy"])  # prompts compile what prompts need
    with compilations() as compiled:
        said(llm, KINDS["seeded"])
    assert compiled == []


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_the_host_waits_for_nothing_while_it_launches(eager: bool) -> None:
    """torch raises at whatever makes the host wait for the device, but for events."""
    llm = LLM(num_blocks=400, enforce_eager=eager, enable_prefix_caching=False, **OPTIONS)
    runner = llm.engine.executor.runner
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.9, "n": 2},
        {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.1},
        {"temperature": 0.8, "logit_bias": {7: 2.0}, "min_tokens": 3, "stop_token_ids": [7]},
        {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1},
        {"temperature": 0.8, "min_p": 0.05},
    ]
    mixed = [SamplingParams(seed=i, max_tokens=20, **kinds[i % len(kinds)]) for i in range(NUM_REQUESTS)]
    for params in (KINDS["seeded"], mixed):
        said(llm, params)  # warm
    launch = runner.launch
    checked = {"graph": 0, "with a chunk": 0, "chunks beside decodes": 0, "decodes": 0}

    def watched(step):  # type: ignore[no-untyped-def]
        lengths = {min(s.num_tokens, 2) for s in step.sequences}
        is_graph = runner.graphs is not None and runner.graphs.fits(step)
        kind = {(1, 2): "chunks beside decodes", (2,): "with a chunk"}.get(tuple(sorted(lengths)), "decodes")
        torch.cuda.set_sync_debug_mode("error")
        try:
            running = launch(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        checked["graph" if is_graph else kind] += 1
        return running

    runner.launch = watched  # type: ignore[method-assign]
    for params in (KINDS["seeded"], mixed):
        said(llm, params)
    assert (checked["graph"] > 20) != eager and (checked["decodes"] > 20) == eager, checked
    assert checked["chunks beside decodes"] > 2, checked


def test_the_profile_leaves_room_for_everything_that_is_then_taken() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    llm = LLM(gpu_memory_utilization=0.3, **OPTIONS)
    profile, graphs = llm.engine.memory.profile, llm.engine.executor.runner.graphs
    assert profile is not None and graphs is not None
    assert llm.engine.memory.pool_bytes <= profile.available_kv_bytes
    assert graphs.num_bytes <= profile.graphs
    torch.cuda.reset_peak_memory_stats()
    said(llm, KINDS["mixed"])
    assert torch.cuda.max_memory_allocated() - before <= profile.budget


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the kernels that Triton compiles, or loads from its cache on disk, within the block."""
    from triton import knobs

    names: list[str] = []

    def listener(*, src: Any, **_: Any) -> None:
        names.append(src.name)

    previous, knobs.compilation.listener = knobs.compilation.listener, listener
    try:
        yield names
    finally:
        knobs.compilation.listener = previous
