"""Decode steps that are captured once say what steps launched one kernel after the other say."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, ClassVar
from weakref import WeakSet

import pytest
import torch
from captured import Recorder, call_again, unchecked, with_graphs  # noqa: F401

from paged_infer import SamplingParams
from paged_infer.cache.paged import PagedCache
from paged_infer.control.step import SamplingRow
from paged_infer.execution import cuda_graphs
from paged_infer.execution.cuda_graphs import DecodeGraphs, batch_sizes
from paged_infer.execution.memory_profile import CudaMeter
from paged_infer.kernels.attention_backends import triton_backend
from paged_infer.kernels.op_sets import TRITON_OPS
from paged_infer.kernels.triton_runtime import launches_go_to
from paged_infer.model.config import ModelConfig
from paged_infer.model.decoder import Decoder
from paged_infer.sampling.sampler import Sampler

PROMPTS = [[5, 6, 7], [9] * 6, [11, 12], list(range(20, 41)), [3], [8, 8, 8, 8]]
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, max_tokens=12, ignore_eos=True, seed=4)
MIXED = [
    GREEDY,
    SEEDED,
    SamplingParams(temperature=0.8, top_k=5, seed=1, max_tokens=11, ignore_eos=True),
    SamplingParams(temperature=0, repetition_penalty=1.4, logprobs=2, max_tokens=7, ignore_eos=True),
    SamplingParams(temperature=1.0, n=3, seed=9, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=0.7, logit_bias={7: 30.0}, top_p=0.8, seed=2, max_tokens=8, prompt_logprobs=1),
]
SETTINGS: dict[str, dict[str, Any]] = {
    "usual": {},
    "ahead": {"async_scheduling": True},
    "ahead-block-1-preempting": {"async_scheduling": True, "block_size": 1, "num_blocks": 60},
    "swapping": {"block_size": 3, "num_blocks": 22, "preemption_mode": "swap"},
    "ahead-chunk-7": {"async_scheduling": True, "block_size": 3, "max_num_batched_tokens": 7},
    "three-at-a-time": {"max_num_seqs": 3},
}


def said(llm, params=MIXED, prompts=PROMPTS) -> list[Any]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[(o.token_ids, o.finish_reason, o.logprobs) for o in output.outputs] for output in outputs]


def assert_alike(ours: list[Any], expected: list[Any]) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        for (tokens, reason, logprobs), (other_tokens, other_reason, other_logprobs) in zip(mine, theirs, strict=True):
            assert (tokens, reason) == (other_tokens, other_reason)
            for one, other in zip(logprobs or [], other_logprobs or [], strict=True):
                assert one.keys() == other.keys()
                assert all(abs(one[t].logprob - other[t].logprob) < 1e-4 for t in one)


# -- Batch sizes


def test_every_number_of_rows_has_a_graph_that_holds_it_and_is_not_much_larger() -> None:
    for largest in (*range(1, 70), 255, 256, 257, 300, 511, 513, 1000, 4096):
        sizes = batch_sizes(largest)
        assert sizes == sorted(set(sizes)) and sizes[-1] == largest
        for num_rows in range(1, largest + 1):
            fitting = next(size for size in sizes if size >= num_rows)
            assert fitting - num_rows < max(8, num_rows / 8)
    assert len(batch_sizes(256)) == 35


@pytest.mark.parametrize("num_requests", range(1, 8))
def test_odd_batches_are_filled_up_and_the_filling_changes_nothing(num_requests, make_llm) -> None:
    eager = make_llm("qwen3", max_num_seqs=7, attention_backend="torch")
    captured = with_graphs(make_llm("qwen3", max_num_seqs=7, attention_backend="torch"), call_again)
    prompts = [[5 + i, 6, 7 * i] for i in range(num_requests)]
    assert_alike(said(captured, GREEDY, prompts), said(eager, GREEDY, prompts))
    graphs = captured.engine.executor.runner.graphs
    assert graphs.num_replays == GREEDY.max_tokens - 1  # all but the step of prompts
    assert graphs.sizes == [1, 2, 4, 7]
    # What lies in the pool is the same too: a row that only fills up stores nothing.
    for ours, theirs in zip(
        captured.engine.executor.runner.cache.keys, eager.engine.executor.runner.cache.keys, strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# -- The same tokens


@pytest.mark.parametrize("name", SETTINGS)
def test_a_mixed_crowd_gets_the_same_tokens_and_logprobs(name, make_llm) -> None:
    options = {"attention_backend": "torch", "num_blocks": 128, **SETTINGS[name]}
    expected = said(make_llm(**{**options, "async_scheduling": False}))
    captured = with_graphs(make_llm(**options), call_again)
    for _ in range(2):  # from scratch, then with what the first left in the prefix cache
        assert_alike(said(captured), expected)
        captured.check_integrity()
    assert captured.engine.executor.runner.graphs.num_replays > 10
    assert not name.endswith("preempting") or captured.stats()["preemptions"]


@pytest.mark.parametrize("family", ["gpt2", "llama3", "mistral", "qwen2-window", "qwen2-moe", "deepseek3"])
def test_every_family_can_be_captured(family, make_llm) -> None:
    options = {"attention_backend": "torch", "async_scheduling": True}
    captured = with_graphs(make_llm(family, **options), call_again)
    assert_alike(said(captured, GREEDY), said(make_llm(family, attention_backend="torch"), GREEDY))
    assert captured.engine.executor.runner.graphs.num_replays


def test_a_pending_token_is_taken_from_a_step_that_was_not_captured(make_llm) -> None:
    """Prompts arrive while others decode: steps with and without graphs follow each other, each one ahead."""
    said_by = []
    for graphs in (False, True):
        llm = make_llm(attention_backend="torch", async_scheduling=graphs, max_num_batched_tokens=8)
        if graphs:
            with_graphs(llm, call_again)
        tokens = {}
        for number, prompt in enumerate(PROMPTS):
            llm.engine.add_request(str(number), prompt, SEEDED)
            for _ in range(3):
                tokens |= {o.request_id: o.outputs[0].token_ids for o in llm.engine.step().outputs}
        while llm.engine.has_unfinished_requests:
            tokens |= {o.request_id: o.outputs[0].token_ids for o in llm.engine.step().outputs}
        said_by.append(tokens)
    assert said_by[0] == said_by[1] and llm.engine.executor.runner.graphs.num_replays > 5


# -- As CUDA captures


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.usefixtures("unchecked")
def test_what_is_captured_is_all_that_a_step_needs(ahead, make_llm) -> None:
    """Replayed without Python, amid rubbish: tables grow, sequences end, tokens are drawn by seed within."""
    options = {"attention_backend": "triton", "max_num_seqs": 3, "block_size": 2}
    params = [
        SamplingParams(temperature=0, max_tokens=7, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=3, max_tokens=4, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=5, max_tokens=5, ignore_eos=True),
    ]
    recorder = Recorder()
    captured = with_graphs(make_llm("qwen3", async_scheduling=ahead, **options), recorder)
    expected = said(make_llm("qwen3", attention_backend="torch", block_size=2), params, PROMPTS[:3])
    assert_alike(said(captured, params, PROMPTS[:3]), expected)
    graphs = captured.engine.executor.runner.graphs
    assert graphs.has_sampler and graphs.num_replays == 6 and recorder.num_operations > 30


@pytest.mark.usefixtures("unchecked")
def test_experts_and_latents_are_captured_without_a_look_at_the_router(make_llm) -> None:
    """Replayed without Python, where other experts are hit in each step."""
    options = {"attention_backend": "triton", "max_num_seqs": 1, "num_blocks": 8}
    captured = with_graphs(make_llm("deepseek3", **options), Recorder())
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    expected = said(make_llm("deepseek3", attention_backend="torch"), params, PROMPTS[:1])
    assert_alike(said(captured, params, PROMPTS[:1]), expected)
    assert captured.engine.executor.runner.graphs.num_replays == 2


def test_on_a_gpu_a_layer_is_five_launches_that_no_value_decides(checkpoint) -> None:
    """On tensors without values, with tiles as for sm90: whatever looked at a length or a token would fail here.

    One more where a context may be cut into splits, which one launch plans for all layers; none to store, as the
    rotation does, and none for prompts.
    """
    config = ModelConfig.from_pretrained(checkpoint("qwen3"))
    with torch.device("meta"):
        decoder = Decoder(config, TRITON_OPS)
    cache = PagedCache(decoder.kv_spec(), 9, 16, triton_backend, "meta", TRITON_OPS)
    launched: list[list[str]] = []

    def capture(fn):
        launched.append([])
        fn()
        return lambda: None

    def note(kernel, *_) -> None:
        launched[-1].append(kernel.fn.__name__)

    layer = [
        "_add_rms_norm_kernel",
        "_qk_norm_rope_kernel",
        "_decode_kernel",
        "_add_rms_norm_kernel",
        "_silu_mul_kernel",
    ]
    end = ["_add_rms_norm_kernel", "_race_kernel", "_final_kernel"]
    short = layer * config.num_layers + end
    for max_model_len, is_split in ((256, False), (512, True)):
        launched.clear()
        with launches_go_to(note, (9, 0)):
            sample = TRITON_OPS.sample
            graphs = DecodeGraphs(decoder, cache, sample, max_rows=300, max_model_len=max_model_len, capture=capture)
        assert len(launched) == len(graphs.sizes)
        for names in launched:
            assert [name for name in names if name not in ("_plan_kernel", "_combine_kernel")] == short
            assert names.count("_plan_kernel") == is_split
            assert names.count("_combine_kernel") == config.num_layers * is_split


def test_a_capture_that_reads_the_host_or_waits_for_the_device_is_found() -> None:
    x = torch.ones(3)
    for step in (
        lambda: x.add_(torch.tensor([1.0, 2.0, 3.0])),
        lambda: x.mul_(float(x.sum().item())),
        lambda: x.sum().tolist(),
        lambda: x[x > 0.5],
        lambda: x.add_(1) if (x > 0).all() else None,
    ):
        with pytest.raises(AssertionError, match="within a captured step"):
            Recorder()(step)


def test_a_replay_does_what_was_captured_with_what_the_tensors_hold_now() -> None:
    x, out, steps = torch.ones(3), torch.zeros(3), []

    def step() -> None:
        steps.append(1)
        out.copy_((x * 2 + len(steps)).sum().expand(3))

    replay = Recorder()(step)  # runs it once to warm up, and once more to capture
    x.fill_(10.0)
    replay()
    assert out.tolist() == [66.0] * 3  # 3 * (20 + 2): x as it is now, the count as it was then
    assert len(steps) == 2


# -- What is drawn


def test_a_row_that_cannot_be_drawn_from_ends_its_request_and_is_no_index_out_of_range(make_llm) -> None:
    """It leaves -1 on the device, where the step behind already looks for its token."""

    def broken(logits, *_):
        return torch.full((len(logits),), -1), torch.full((len(logits),), torch.nan)

    for graphs in (False, True):
        llm = make_llm(attention_backend="torch", async_scheduling=True)
        engine = llm.engine
        engine.executor.runner.sampler = Sampler(broken)
        if graphs:
            engine.executor.runner.cache.ops = engine.executor.runner.cache.ops._replace(sample=broken)
            with_graphs(llm, call_again)
        for output in llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False):
            assert output.outputs[0].finish_reason == "error"
        llm.check_integrity()


def test_the_kernel_is_enough_only_where_it_draws_what_the_sampler_would() -> None:
    sampler = Sampler(lambda logits, *_: (logits.argmax(1), logits.amax(1)))

    def is_enough(num_output_tokens: int = 5, **params: Any) -> bool:
        rows = [a_row(GREEDY), a_row(SamplingParams(**params), num_output_tokens)]
        return sampler.is_kernel_enough(rows, 100)

    assert is_enough(temperature=0) and is_enough(temperature=0.7) and is_enough(top_k=100)
    assert is_enough(min_tokens=5) and not is_enough(min_tokens=6)
    assert is_enough(logprobs=3)
    for params in (
        {"top_k": 99}, {"top_p": 0.9}, {"min_p": 0.1}, {"presence_penalty": 0.5},
        {"repetition_penalty": 1.1, "temperature": 0}, {"logit_bias": {3: 1.0}, "temperature": 0},
    ):  # fmt: skip
        assert not is_enough(**params), params
    assert not Sampler().is_kernel_enough([a_row(SEEDED)], 100)


def a_row(params: SamplingParams, num_output_tokens: int = 5) -> SamplingRow:
    return SamplingRow(params, 0, 0, 9, num_output_tokens)


# -- Their memory


class Held:
    """Holds bytes of a stand-in device until it is collected."""

    alive: ClassVar[WeakSet[Held]] = WeakSet()

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.alive.add(self)

    def drop_in_a_cycle(self) -> None:
        self.itself = self


@pytest.fixture
def memory(monkeypatch) -> Iterator[None]:
    """A device of 10,000 bytes; garbage is collected only on request."""
    gc.collect()
    Held.alive.clear()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    free = lambda device: (10_000 - sum(held.num_bytes for held in Held.alive), 10_000)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("memory")
def test_the_bytes_of_graphs_leave_out_what_was_garbage_before_or_after(make_llm, monkeypatch) -> None:
    held = []

    def capture(fn):
        held.append(Held(7))
        Held(1000).drop_in_a_cycle()  # as a capture's warm-up may
        return fn

    monkeypatch.setattr(cuda_graphs, "CudaCapture", lambda device: capture)
    engine = make_llm(attention_backend="torch").engine
    Held(5000).drop_in_a_cycle()  # an earlier engine's
    graphs = cuda_graphs.decode_graphs(engine.decoder, engine.executor.runner.cache, 8, 32)
    assert graphs.num_bytes == 7 * len(graphs.sizes) == 7 * len(held)


@pytest.mark.usefixtures("memory")
def test_garbage_is_free_to_a_profile() -> None:
    Held(5000).drop_in_a_cycle()
    assert CudaMeter(torch.device("cpu")).free_and_total() == (10_000, 10_000)


# -- The option


def test_graphs_that_cannot_be_are_an_error_and_eager_is_what_a_cpu_does(make_llm) -> None:
    with pytest.raises(ValueError, match=r"enforce_eager=False requests CUDA graphs.*the device is cpu"):
        make_llm(enforce_eager=False)
    with pytest.raises(ValueError, match="enforce_eager='yes'"):
        make_llm(enforce_eager="yes")
    for option in (None, True):
        assert make_llm(enforce_eager=option).engine.executor.runner.graphs is None


def test_only_steps_of_single_drawn_tokens_fit(make_llm) -> None:
    llm = with_graphs(make_llm(attention_backend="torch", max_num_seqs=2), call_again)
    graphs: DecodeGraphs = llm.engine.executor.runner.graphs
    llm.engine.add_request("a", [5, 6], GREEDY)
    fitting = []
    launch = llm.engine.executor.runner.launch
    llm.engine.executor.runner.launch = lambda step: fitting.append(graphs.fits(step)) or launch(step)
    while llm.engine.has_unfinished_requests:
        llm.engine.step()
    assert fitting == [False] + [True] * (GREEDY.max_tokens - 1)
