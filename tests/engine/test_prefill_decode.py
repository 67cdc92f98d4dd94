"""Prefill and decode in two engines: the tokens of one, blocks that move only under their own hash, and no orphan."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paged_infer import LLM, AsyncLLM, SamplingParams
from paged_infer.async_llm import EngineDeadError
from paged_infer.config import EngineConfig
from paged_infer.engine import engine_process, prefill_decode
from paged_infer.engine.block_exchange import open_exchange, receive_blocks, send_blocks
from paged_infer.engine.prefill_decode import PrefillDecode
from paged_infer.engine.process_messages import EngineSpec
from paged_infer.engine.spawned_process import StartedProcess
from paged_infer.outputs import RequestOutput

OPTIONS: dict[str, Any] = {"device": "cpu", "num_blocks": 64, "block_size": 4, "max_num_seqs": 8, "max_model_len": 96}
ROOMY = {**OPTIONS, "num_blocks": 256}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = list(range(5, 28))  # 5 full blocks and 3 tokens


def chain_of(llm: LLM, prompt: list[int], salt: str | None = None) -> list[bytes]:
    request = llm.engine.prepare("for its hashes", prompt, GREEDY, cache_salt=salt)
    return request.sequences[0].hash_chain(OPTIONS["block_size"])


@pytest.fixture
def pair(make_llm, tmp_path: Path) -> tuple[LLM, LLM, str]:
    """Two engines of one model that have mapped one file."""
    first, second, path = make_llm(**OPTIONS), make_llm(**OPTIONS), str(tmp_path / "blocks")
    layouts = [open_exchange(llm.engine, path, 24) for llm in (first, second)]
    assert layouts[0] == layouts[1] and len(layouts[0]) > 1
    return first, second, path


def test_the_file_is_in_shared_memory_only_if_it_has_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prefill_decode, "SHARED_MEMORY", str(tmp_path))
    assert prefill_decode.folder_for(1) == str(tmp_path)
    assert prefill_decode.folder_for(1 << 60) is None
    monkeypatch.setattr(prefill_decode, "SHARED_MEMORY", str(tmp_path / "missing"))
    assert prefill_decode.folder_for(1) is None


def test_blocks_that_were_handed_over_are_found_and_give_the_same_tokens(pair) -> None:
    first, second, path = pair
    (expected,) = first.generate([PROMPT], GREEDY, use_tqdm=False)
    chain = chain_of(second, PROMPT)
    receipt = send_blocks(first.engine, path, chain)
    assert receipt == chain and len(chain) == 5
    assert receive_blocks(second.engine, path, chain, receipt) == 5
    second.check_integrity()
    (output,) = second.generate([PROMPT], GREEDY, use_tqdm=False)
    assert output.metrics.num_cached_tokens == 20
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids


def test_what_is_handed_over_is_read_and_not_computed_again(pair) -> None:
    first, second, path = pair
    (expected,) = first.generate([PROMPT], GREEDY, use_tqdm=False)
    chain = chain_of(second, PROMPT)
    receipt = send_blocks(first.engine, path, chain)
    cache = first.engine.in_process.runner.cache
    space = cache.shared_swap_space(Path(path), 24)
    for tensor in space:
        tensor.zero_()  # both have mapped the same memory
    receive_blocks(second.engine, path, chain, receipt)
    (output,) = second.generate([PROMPT], GREEDY, use_tqdm=False)
    assert output.outputs[0].token_ids != expected.outputs[0].token_ids


@pytest.mark.parametrize(("prompt", "salt"), [([9, *PROMPT[1:]], None), (PROMPT, "another")])
def test_a_block_is_taken_only_under_the_hash_of_its_own_tokens_and_salt(pair, prompt: list[int], salt: str) -> None:
    first, second, path = pair
    first.generate([PROMPT], GREEDY, use_tqdm=False)
    receipt = send_blocks(first.engine, path, chain_of(first, PROMPT))
    assert receive_blocks(second.engine, path, chain_of(second, prompt, salt), receipt) == 0
    assert second.engine.manager.pool.num_hashed == 0


def test_a_forged_block_ends_what_is_taken(pair) -> None:
    first, second, path = pair
    first.generate([PROMPT], GREEDY, use_tqdm=False)
    chain = chain_of(second, PROMPT)
    receipt = send_blocks(first.engine, path, chain)
    receipt[2] = b"forged"
    assert receive_blocks(second.engine, path, chain, receipt) == 2


def test_only_blocks_that_are_still_there_are_sent(pair) -> None:
    first, second, path = pair
    first.generate([PROMPT], GREEDY, use_tqdm=False)
    chain = chain_of(first, PROMPT)
    first.engine.manager.forget([chain[3]])
    assert send_blocks(first.engine, path, chain) == chain[:3]
    assert send_blocks(second.engine, path, chain) == []


def test_a_full_pool_takes_what_fits_and_leaves_what_is_held(pair) -> None:
    first, second, path = pair
    first.generate([PROMPT], GREEDY, use_tqdm=False)
    chain = chain_of(second, PROMPT)
    receipt = send_blocks(first.engine, path, chain)
    pool = second.engine.manager.pool
    held = [pool.take() for _ in range(pool.num_blocks - 3)]
    spare = second.engine.manager.num_spare_blocks
    assert receive_blocks(second.engine, path, chain, receipt) == spare < len(chain)
    for block in held:
        pool.release(block)
    second.check_integrity()


def test_ctrl_c_while_the_second_engine_is_started_ends_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[FakeProcess] = []

    def spawn(*_: object) -> StartedProcess:
        if started:
            raise KeyboardInterrupt
        started.append(FakeProcess())
        return StartedProcess(started[0], started[0].ours)

    monkeypatch.setattr(engine_process, "spawn", spawn)
    with pytest.raises(KeyboardInterrupt):
        PrefillDecode(EngineSpec(Path(), EngineConfig(), None, 1))
    assert started[0].is_killed


class FakeProcess:
    def __init__(self) -> None:
        self.ours, self.theirs = multiprocessing.Pipe()
        self.exitcode: int | None = None
        self.is_killed = False

    def kill(self) -> None:
        self.exitcode, self.is_killed = -9, True
        self.theirs.close()

    def join(self, timeout: float | None = None) -> None:
        pass


@pytest.fixture(scope="module")
def apart(checkpoint) -> Iterator[AsyncLLM]:
    """One pair of processes; the last test kills one of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        engine = AsyncLLM(checkpoint("qwen3"), disaggregated_prefill=True, **ROOMY)
    yield engine
    asyncio.run(engine.shutdown())


async def last(engine: AsyncLLM, prompt: list[int], params: SamplingParams) -> RequestOutput:
    return [output async for output in engine.generate(prompt, params)][-1]


def test_in_two_processes_the_tokens_are_those_of_one_engine(apart: AsyncLLM, make_llm) -> None:
    prompts = [[5 + (i * j) % 60 for j in range(1, 3 + 4 * i)] for i in range(12)]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=3 + i, ignore_eos=True) for i in range(12)]

    async def main() -> list[RequestOutput]:
        return await asyncio.gather(*map(last, [apart] * 12, prompts, params))

    outputs = asyncio.run(main())
    expected = make_llm(**OPTIONS).generate(prompts, params, use_tqdm=False)
    assert [one.outputs[0].token_ids for one in outputs] == [one.outputs[0].token_ids for one in expected]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.metrics.num_cached_tokens == (len(prompt) - 1) // 4 * 4, "all full blocks were handed over"
    asyncio.run(apart.check_integrity())


def test_an_aborted_request_ends_wherever_it_is(apart: AsyncLLM) -> None:
    async def main() -> None:
        streams = [await apart.submit([5] * 60, GREEDY, f"aborted {i}") for i in range(20)]
        for i in range(20):
            apart.abort(f"aborted {i}")
        for stream in streams:
            assert [one async for one in stream][-1].outputs[0].finish_reason in ("abort", "length")
        assert apart.stats()["num_waiting"] == 0
        await apart.check_integrity()

    asyncio.run(main())


def test_when_the_prefill_engine_is_killed_every_request_ends(apart: AsyncLLM) -> None:
    core: Any = apart._core

    async def main() -> None:
        streams = [await apart.submit([5 + i] * 60, GREEDY) for i in range(30)]
        os.kill(core.prefill.process.pid, signal.SIGKILL)
        ends = [await end_of(stream) for stream in streams]
        assert any("the prefill engine has ended: killed by SIGKILL" in end for end in ends)
        with pytest.raises(EngineDeadError, match="the prefill engine has ended"):
            await apart.submit([5], GREEDY)

    async def end_of(stream: Any) -> str:
        try:
            return str([one async for one in stream][-1].outputs[0].finish_reason)
        except EngineDeadError as error:
            return str(error)

    asyncio.run(main())
    assert core.gone.wait(300) and core.prefill.gone.wait(300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_parallel_size": 2}, "data_parallel_size=2: must be 1"),
        ({"tensor_parallel_size": 2}, "whole blocks are handed over"),
        ({"enable_prefix_caching": False}, "blocks are handed over to the prefix cache"),
    ],
)
def test_options_that_cannot_be_are_refused(checkpoint, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AsyncLLM(checkpoint("qwen3"), disaggregated_prefill=True, **{**OPTIONS, **options})
