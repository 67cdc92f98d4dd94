"""Two ranks in processes of their own: the same tokens as one process, and one clear error when a rank is lost."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from holding import LIMIT_S
from rank_pids import children, is_running

from paged_infer import LLM, BeamSearchParams, RequestOutput, SamplingParams, StructuredOutputsParams, storyteller
from paged_infer.control.policies import Chunked
from paged_infer.control.speculation import SpeculativeConfig, make_proposer
from paged_infer.engine.engine_thread import EngineThread
from paged_infer.execution import multiprocess, rank_processes
from paged_infer.execution.errors import EngineDeadError
from paged_infer.execution.rank_processes import ProcessStep
from paged_infer.model.loading.hub import BUNDLED

PROMPTS = ["Once upon a time", "A story about Mia and a kite.", "A story about Mia and a red key.", "Tom was sad."]
GREEDY = SamplingParams(temperature=0, max_tokens=24)
SEEDED = SamplingParams(temperature=0.9, seed=3, max_tokens=24)
DRAFT = {"method": "draft_model", "model": str(storyteller.DRAFT_PATH), "num_speculative_tokens": 3}
TINY = {"block_size": 4, "max_num_seqs": 8, "num_blocks": 26, "max_model_len": 96, "max_num_batched_tokens": 32}
SLOW = {"distributed_timeout": 300}  # no test fails because the machine is busy


def said(llm: LLM, params: SamplingParams | BeamSearchParams, prompts: list[str] = PROMPTS) -> list[Any]:
    """Everything that the outputs say, but times."""
    run = llm.beam_search if isinstance(params, BeamSearchParams) else llm.generate
    outputs: list[RequestOutput] = run(prompts, params, use_tqdm=False)
    llm.check_integrity()
    return [[(one.token_ids, one.text, one.finish_reason) for one in output.outputs] for output in outputs]


class Pair:
    """The same engine with two ranks, and in this process."""

    def __init__(self, model: Any = None, **options: Any) -> None:
        self.ranks = LLM(model, **options, tensor_parallel_size=2, **SLOW)
        self.alone = LLM(model, **options)

    def agree(self, params: SamplingParams | BeamSearchParams, prompts: list[str] = PROMPTS) -> None:
        assert said(self.ranks, params, prompts) == said(self.alone, params, prompts)


@pytest.fixture(scope="module")
def recomputing() -> Iterator[Pair]:
    pair = Pair(**TINY, reasoning_parser="deepseek_r1")
    yield pair
    pair.ranks.shutdown()


@pytest.fixture(scope="module")
def swapping() -> Iterator[Pair]:
    class Own(Chunked):
        """A policy that no other process can import: it is not sent."""

    pair = Pair(**TINY, preemption_mode="swap", kv_cache_dtype="int8", async_scheduling=True, scheduling_policy=Own())
    yield pair
    pair.ranks.shutdown()


@pytest.fixture(scope="module")
def drafting() -> Iterator[Pair]:
    pair = Pair(BUNDLED["storyteller-moe"], **TINY, speculative_config=DRAFT, trace=True)
    yield pair


KINDS = {
    "greedy": GREEDY,
    "seeded": SEEDED,
    "three samples": SamplingParams(temperature=0.9, seed=3, n=3, max_tokens=24),
    "penalties": SamplingParams(temperature=0, repetition_penalty=1.1, min_tokens=12, max_tokens=24),
    "a stop string": SamplingParams(temperature=0, max_tokens=24, stop=["."]),
    "beams": BeamSearchParams(beam_width=3, max_tokens=16),
}


def test_the_masks_of_grammars_and_of_budgets_reach_every_rank(recomputing: Pair) -> None:
    kites = r"(Mia|Leo) has \d{1,3} kites?\."
    for params in (replace(GREEDY, thinking_token_budget=0), replace(SEEDED, thinking_token_budget=5)):
        params = replace(params, structured_outputs=StructuredOutputsParams(regex=kites))
        recomputing.agree(params)
        for ((_, text, reason),) in said(recomputing.ranks, params):
            assert reason == "stop" and re.fullmatch(kites, text.partition("</think>")[2])


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_the_same_tokens_under_recomputation(kind: str, recomputing: Pair) -> None:
    recomputing.agree(KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_the_same_tokens_with_swaps_and_an_8_bit_cache(kind: str, swapping: Pair) -> None:
    swapping.agree(KINDS[kind])


@pytest.mark.parametrize("kind", ["greedy", "seeded", "three samples"])
def test_two_ranks_give_the_same_tokens_with_a_draft_model_and_experts(kind: str, drafting: Pair) -> None:
    drafting.agree(KINDS[kind])


def test_two_ranks_give_the_same_tokens_with_prompt_lookup(recomputing: Pair) -> None:
    lookup = {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    config = SpeculativeConfig(method="ngram", num_speculative_tokens=3, **lookup)
    recomputing.ranks.engine.scheduler.proposer = make_proposer(config)
    recomputing.agree(GREEDY)
    recomputing.agree(SEEDED)
    recomputing.ranks.engine.scheduler.proposer = None
    assert recomputing.ranks.stats()["num_accepted_tokens"] > 0


def test_preemptions_shared_blocks_swaps_and_drafts_do_happen_on_two_ranks(
    recomputing: Pair, swapping: Pair, drafting: Pair
) -> None:
    for pair in (recomputing, swapping, drafting):
        pair.agree(KINDS["three samples"])  # so that this test stands alone
        pair.agree(KINDS["three samples"])
    stats = {name: pair.ranks.stats() for name, pair in (("r", recomputing), ("s", swapping), ("d", drafting))}
    assert stats["r"]["preemptions"] > 0 and stats["r"]["prefix_hit_tokens"] > 0 and stats["r"]["blocks_copied"] > 0
    assert stats["s"]["blocks_swapped_out"] > 0 and stats["s"]["blocks_swapped_in"] > 0
    assert stats["d"]["num_accepted_tokens"] > 0
    assert drafting.ranks.trace.expert_load == drafting.alone.trace.expert_load != []


def test_logprobs_come_from_rank_0(recomputing: Pair) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=2, prompt_logprobs=2)
    ranks, alone = (llm.generate(PROMPTS[0], params, use_tqdm=False)[0] for llm in vars(recomputing).values())
    for found, expected in ((ranks.outputs[0].logprobs, alone.outputs[0].logprobs),
                            (ranks.prompt_logprobs[1:], alone.prompt_logprobs[1:])):  # fmt: skip
        assert [[*one] for one in found] == [[*one] for one in expected]
        values = [[entry.logprob for one in many for entry in one.values()] for many in (found, expected)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_what_the_ranks_hand_to_collectives_is_in_the_stats(recomputing: Pair) -> None:
    """Two sums a layer and one for the embedding, of each token; one gather of the logits, of each step's one row."""
    before = recomputing.ranks.stats()
    (output,) = recomputing.ranks.generate("Once", SamplingParams(max_tokens=3, min_tokens=3), use_tqdm=False)
    after, config = recomputing.ranks.stats(), recomputing.alone.engine.model_config
    grown = {name: after[name] - before[name] for name in after}
    num_tokens = len(output.prompt_token_ids) + 3 - 1 - grown["prefix_hit_tokens"]
    sums = 2 * config.num_layers + 1
    assert (grown["all_reduces"], grown["all_gathers"], grown["steps"]) == (3 * sums, 3, 3)
    assert grown["collective_bytes"] == 4 * (num_tokens * sums * config.hidden_size + 3 * -(-config.vocab_size // 2))
    assert recomputing.alone.stats()["collective_bytes"] == 0


def test_a_stream_that_is_closed_leaves_the_ranks_usable(recomputing: Pair) -> None:
    stream = recomputing.ranks.stream(PROMPTS[0], GREEDY)
    next(stream)
    stream.close()
    recomputing.agree(GREEDY)


def test_an_interrupted_step_leaves_the_ranks_usable(recomputing: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while this process waits for the ranks: their result is read, and dropped, by the next call."""
    wait, waits = ProcessStep.wait, []

    def interrupted(step: ProcessStep) -> None:
        waits.append(step)
        if len(waits) == 3:
            signal.raise_signal(signal.SIGINT)
        wait(step)

    monkeypatch.setattr(ProcessStep, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recomputing.ranks.generate(PROMPTS, GREEDY, use_tqdm=False)
    recomputing.agree(GREEDY)


def test_what_needs_the_model_in_this_process_is_refused(recomputing: Pair) -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size=2: the model is in other processes"):
        _ = recomputing.ranks.engine.decoder


def test_params_of_a_class_that_the_ranks_may_not_know_are_refused(recomputing: Pair) -> None:
    class Mine(SamplingParams):
        pass

    with pytest.raises(ValueError, match=r"params=.*: must be SamplingParams or BeamSearchParams, and of no class"):
        recomputing.ranks.generate(PROMPTS[0], Mine(max_tokens=2), use_tqdm=False)
    assert said(recomputing.alone, Mine(temperature=0, max_tokens=24)) == said(recomputing.ranks, GREEDY)


# -- failures: the last tests of the engines above ---------------------------------------------------------------------


def test_a_rank_that_is_killed_ends_the_call_and_all_later_ones(recomputing: Pair) -> None:
    llm, pids = recomputing.ranks, recomputing.ranks.engine.executor.pids
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(EngineDeadError, match=rf"rank 1 \(process {pids[1]}\) was ended by SIGKILL$"):
        for _ in stream:
            pass
    assert not any(map(is_running, pids))
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    llm.check_integrity()
    assert llm.stats()["free_blocks"] == llm.stats()["num_blocks"]


def test_a_rank_that_is_stopped_ends_the_engine_within_the_time_limit(swapping: Pair) -> None:
    """Idle or not: a thread of its own watches the ranks. The engine's thread, asleep, wakes up and ends."""
    llm, pids = swapping.ranks, swapping.ranks.engine.executor.pids
    thread = EngineThread(llm.engine, max_num_waiting=8)
    llm.engine.executor._ranks.timeout_s = 3.0
    os.kill(pids[0], signal.SIGSTOP)
    assert thread.join(LIMIT_S)
    message = rf"rank 0 \(process {pids[0]}\) has sent no heartbeat for distributed_timeout=3 s"
    with pytest.raises(EngineDeadError, match=f"the engine has failed: {message}"):
        thread.check_alive()
    with pytest.raises(EngineDeadError, match=message):
        llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert not any(map(is_running, pids))


def test_shutdown_ends_the_ranks_and_later_calls(drafting: Pair) -> None:
    pids = drafting.ranks.engine.executor.pids
    assert len(pids) == 2 and all(map(is_running, pids))
    drafting.ranks.shutdown()
    assert not any(map(is_running, pids))
    drafting.ranks.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        drafting.ranks.generate(PROMPTS[0], GREEDY, use_tqdm=False)


def faulty(fault: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> LLM:
    monkeypatch.setattr(rank_processes, "MODULE", "faulty_worker")
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    return LLM(**TINY, tensor_parallel_size=2, **options)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("other options", ValueError, r"rank 1 was started with block_size=8 \(rank 0: 4\)"),
        ("out of memory", EngineDeadError, r"rank 1 has failed: OutOfMemoryError: CUDA out of memory"),
        ("killed", EngineDeadError, r"rank 1 \(process \d+\) was ended by SIGKILL while it loaded"),
        ("unreachable", EngineDeadError, r"rank \d has failed: .*(timed out|timeout)"),
    ],
)
def test_a_rank_that_cannot_start_is_one_error_and_no_process(
    fault: str, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = children()
    with pytest.raises(kind, match=message):
        faulty(fault, monkeypatch, distributed_timeout=5 if fault == "unreachable" else 300)
    assert children() == before


def test_the_smallest_pool_is_that_of_all_ranks_and_a_rank_that_fails_in_a_step_is_the_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = faulty("small pool", monkeypatch, **SLOW)
    assert llm.stats()["num_blocks"] == TINY["num_blocks"] - 2
    assert said(llm, GREEDY) == said(LLM(**{**TINY, "num_blocks": TINY["num_blocks"] - 2}), GREEDY)
    os.kill(llm.engine.executor.pids[1], signal.SIGUSR1)
    with pytest.raises(EngineDeadError, match=r"rank 1 has failed: RuntimeError: the device fell off") as caught:
        for _ in range(1000):  # until the signal has come
            llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert "faulty_worker.py" in str(caught.value.__cause__)
    assert not any(map(is_running, llm.engine.executor.pids))


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="tensor_parallel_size=2: must be at most the number of GPUs, 1"):
        LLM(tensor_parallel_size=2, device="cuda")
    with pytest.raises(ValueError, match="device='cuda:0': 2 ranks need a GPU each"):
        LLM(tensor_parallel_size=2, device="cuda:0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0: must be an integer >= 1"),
        ({"distributed_executor_backend": "mpi"}, "distributed_executor_backend='mpi': must be one of mp, "),
        ({"distributed_timeout": 0, "tensor_parallel_size": 2}, "distributed_timeout=0: must be a finite number > 0"),
        ({"distributed_timeout": 5}, "distributed_timeout=5 with tensor_parallel_size=1: there is no other rank"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(**options)


def test_a_model_that_cannot_be_cut_is_refused_before_a_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocess, "RankProcesses", None)
    with pytest.raises(ValueError, match="tensor_parallel_size=3: does not divide intermediate_size=640"):
        LLM(**TINY, tensor_parallel_size=3, **SLOW)
