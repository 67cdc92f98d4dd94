"""An engine in a process of its own: outputs and errors are those of a thread, and neither process is left behind."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from holding import LIMIT_S, until

from paged_infer import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from paged_infer.async_llm import EngineDeadError, StepReport
from paged_infer.config import EngineConfig
from paged_infer.control.policies import Chunked
from paged_infer.control.request import Request
from paged_infer.engine.engine import LLMEngine
from paged_infer.engine.engine_process import EngineProcess
from paged_infer.engine.output_channel import OutputChannel
from paged_infer.engine.process_messages import EngineSpec, Failed, send
from paged_infer.engine.spawned_process import StartedProcess
from paged_infer.outputs import RequestOutput

OPTIONS: dict[str, Any] = {"device": "cpu", "num_blocks": 96, "max_num_seqs": 8, "max_model_len": 512}
GREEDY = SamplingParams(temperature=0, max_tokens=4)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncLLM]:
    """One for all tests; the last of them kills its process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        engine = AsyncLLM(engine_process=True, **OPTIONS)
    yield engine
    asyncio.run(engine.shutdown())


async def collect(engine: AsyncLLM, *arguments: Any, **options: Any) -> list[RequestOutput]:
    return [output async for output in engine.generate(*arguments, **options)]


async def idle(engine: AsyncLLM) -> None:
    """Until the engine has ended every request; then law 2 holds."""
    while engine._core._channels:  # type: ignore[union-attr]
        await asyncio.sleep(0.005)
    await engine.check_integrity()
    assert engine.stats()["free_blocks"] == engine.stats()["num_blocks"]


def test_every_kind_of_output_is_that_of_the_same_engine_in_this_process(engine: AsyncLLM) -> None:
    prompt = "Once upon a time there was a fox. " * 3
    each: list[SamplingParams | BeamSearchParams] = [
        SamplingParams(temperature=0, max_tokens=40, logprobs=2),
        SamplingParams(seed=3, max_tokens=20, n=3),
        SamplingParams(max_tokens=30),  # its seed is derived from its number
        SamplingParams(temperature=0, max_tokens=60, stop=["."], prompt_logprobs=1),
        BeamSearchParams(beam_width=3, max_tokens=12),
    ]

    async def main() -> list[list[RequestOutput]]:
        outputs = await asyncio.gather(*(collect(engine, prompt, params) for params in each))
        await idle(engine)
        return outputs

    streams = asyncio.run(main())
    llm = LLM(**OPTIONS)
    expected = llm.generate([prompt] * 4, each[:4], use_tqdm=False)  # type: ignore[arg-type]
    expected += llm.beam_search(prompt, each[4], use_tqdm=False)  # type: ignore[arg-type]
    for stream, one in zip(streams, expected, strict=True):
        last = stream[-1]
        assert (last.outputs, last.prompt, last.prompt_token_ids) == (one.outputs, prompt, one.prompt_token_ids)
        assert last.prompt_logprobs == one.prompt_logprobs and last.finished
        assert 0 < last.metrics.ttft <= last.metrics.latency  # type: ignore[operator]
        for before in stream[:-1]:
            for grown, whole in zip(before.outputs, last.outputs, strict=True):
                assert whole.text.startswith(grown.text) and whole.token_ids[: len(grown.token_ids)] == grown.token_ids


def test_bad_input_is_refused_here_with_the_message_of_a_thread(engine: AsyncLLM) -> None:
    for prompt, message in (([], "the prompt is empty"), ([10**6], "not an integer in the vocabulary")):
        with pytest.raises(ValueError, match=message):
            asyncio.run(collect(engine, prompt))


def test_an_id_may_be_used_again_at_once_by_another_request(engine: AsyncLLM) -> None:
    async def main() -> None:
        first = await engine.submit("Once", LONG, "the id")
        await anext(first)
        first.close()
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        (again,) = [o for o in await collect(engine, "The river", params, "the id") if o.finished]
        assert len(again.outputs[0].token_ids) == 3
        await idle(engine)

    asyncio.run(main())


def test_an_aborted_request_ends_with_the_output_so_far(engine: AsyncLLM) -> None:
    async def main() -> None:
        answers = await engine.submit("Once", LONG, "one")
        await anext(answers)
        engine.abort("one")
        last = [output async for output in answers][-1]
        assert last.outputs[0].finish_reason == "abort" and last.outputs[0].token_ids
        await idle(engine)

    asyncio.run(main())


def test_steps_are_observed_with_every_token_once(engine: AsyncLLM) -> None:
    reports: list[StepReport] = []
    engine.observers.append(reports.append)
    params = SamplingParams(max_tokens=7, n=2, ignore_eos=True)
    asyncio.run(collect(engine, "Once", params, "observed", stream=False))
    engine.observers.remove(reports.append)
    grown = [(one.request_id, one.sample_index) for report in reports for one in report.grown]
    assert sorted(grown) == [("observed", 0)] * 7 + [("observed", 1)] * 7
    assert [output.finished for report in reports for output in report.outputs] == [True]


def add(_: LLMEngine, a: int, b: int) -> int:
    return a + b


def unpicklable(_: LLMEngine) -> Any:
    return lambda: 1


def fail(_: LLMEngine) -> None:
    raise KeyError("nothing")


def test_a_function_runs_there_and_its_result_or_error_comes_back(engine: AsyncLLM) -> None:
    assert asyncio.run(engine.run(partial(add, a=2, b=3))) == 5
    with pytest.raises(KeyError, match="nothing"):
        asyncio.run(engine.run(fail))
    with pytest.raises(TypeError, match="the answer cannot be sent"):
        asyncio.run(engine.run(unpicklable))
    with pytest.raises(ValueError, match="cannot be sent to the engine's process"):
        asyncio.run(engine.run(lambda _: 1))


class Mine(SamplingParams):
    """A class that the engine's process could import, but not if it were of a notebook or a function."""


def test_what_could_not_be_sent_or_found_again_is_refused_before_it_is_queued(engine: AsyncLLM) -> None:
    with pytest.raises(
        ValueError, match=r"params=Mine\(.*: must be SamplingParams or BeamSearchParams, and of no class"
    ):
        asyncio.run(engine.submit("Once", Mine(max_tokens=2)))
    with pytest.raises(ValueError, match="request_id=7: must be a str"):
        asyncio.run(engine.submit("Once", SamplingParams(max_tokens=2), 7))  # type: ignore[arg-type]
    assert asyncio.run(collect(engine, "Once", SamplingParams(max_tokens=2)))[-1].finished


def test_signals_to_the_group_do_not_end_it(engine: AsyncLLM) -> None:
    process = engine._core.process  # type: ignore[union-attr]
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
    assert asyncio.run(collect(engine, "Once", SamplingParams(max_tokens=2)))[-1].finished


def test_when_it_is_killed_every_request_ends_with_one_clear_error(engine: AsyncLLM) -> None:
    process = engine._core.process  # type: ignore[union-attr]

    async def main() -> None:
        streams = [await engine.submit("Once", LONG) for _ in range(20)]
        await anext(streams[0])
        os.kill(process.pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDeadError, match="the engine's process has ended: killed by SIGKILL"):
                _ = [output async for output in stream]
        with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
            await engine.submit("Once")
        with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
            await engine.check_integrity()

    asyncio.run(main())
    assert engine.stats()["num_running"] == engine.stats()["num_waiting"] == 0 and not engine.is_abandoned


def test_an_option_that_the_engine_refuses_is_one_error_as_in_a_thread(checkpoint, caplog) -> None:
    with pytest.raises(ValueError, match="max_model_len=1000000 exceeds the model's max_position_embeddings"):
        AsyncLLM(checkpoint("qwen3"), engine_process=True, device="cpu", max_model_len=1_000_000)
    assert not caplog.records


class Hangs(Chunked):
    """A step that never returns. Of this module, so that the engine's process can import it."""

    def plan(self, step: Any) -> None:
        signal.pause()


def test_a_step_that_hangs_ends_the_process_and_its_requests(checkpoint) -> None:
    options = {**OPTIONS, "num_blocks": 16, "max_model_len": 32}
    engine = AsyncLLM(checkpoint("qwen3"), engine_process=True, step_timeout=0.2, scheduling_policy=Hangs(), **options)
    with pytest.raises(EngineDeadError, match=r"abandoned: a step has taken longer than step_timeout=0.2 s"):
        asyncio.run(collect(engine, [1, 2, 3]))
    assert engine._core.gone.wait(LIMIT_S)  # type: ignore[union-attr]
    assert engine._core.process.exitcode == 1  # type: ignore[union-attr]


def break_stats(engine: LLMEngine) -> None:
    engine.stats = lambda: {"lock": threading.Lock()}  # type: ignore[method-assign,dict-item]


def test_outputs_that_cannot_be_sent_end_the_engine_and_not_its_observer(checkpoint) -> None:
    engine = AsyncLLM(checkpoint("qwen3"), engine_process=True, **{**OPTIONS, "num_blocks": 16, "max_model_len": 32})
    asyncio.run(engine.run(break_stats))
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="the outputs of a step could not be sent: cannot pickle"):
            asyncio.run(collect(engine, [8, 9], GREEDY))


class Unsendable(str):
    def __reduce__(self) -> Any:
        raise TypeError("not over a pipe")


class OtherEnd:
    """An engine's process that reads nothing, until it is killed."""

    def __init__(self) -> None:
        self.ours, self.theirs = multiprocessing.Pipe()
        self.exitcode: int | None = None

    def kill(self) -> None:
        self.exitcode = -9
        self.theirs.close()

    def join(self, timeout: float | None = None) -> None:
        pass


def test_a_command_that_cannot_be_sent_ends_the_engine_and_not_its_sender() -> None:
    other = OtherEnd()
    spec = EngineSpec(Path(), EngineConfig(), None, 1)
    process = EngineProcess(spec, start=lambda *_: StartedProcess(other, other.ours))
    answer = process.call(fail)
    request = Request("a", None, [8], GREEDY, 0.0, cache_salt=Unsendable("salt"))
    process.add(request, OutputChannel(asyncio.new_event_loop()), streamed=False)
    with pytest.raises(EngineDeadError, match="killed: a command could not be sent: not over a pipe"):
        answer.result()


def test_a_request_that_is_refused_there_leaves_an_idle_engine_and_not_one_that_is_silent() -> None:
    other = OtherEnd()
    spec = EngineSpec(Path(), EngineConfig(), None, 1)
    process = EngineProcess(spec, start=lambda *_: StartedProcess(other, other.ours))
    process.add(Request("a", None, [8], GREEDY, 0.0), OutputChannel(asyncio.new_event_loop()), streamed=False)
    assert process.watchdog._began_s is not None
    send(other.theirs, Failed("a", ValueError("refused"), 1))
    until(lambda: process.watchdog._began_s is None)
    process.stop()
    assert process.gone.wait(LIMIT_S)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_its_ranks_give_the_same_tokens_and_end_with_it(checkpoint, make_llm) -> None:
    options = {**OPTIONS, "num_blocks": 16, "max_model_len": 32}
    params = SamplingParams(temperature=0, max_tokens=5)
    engine = AsyncLLM(checkpoint("qwen3"), engine_process=True, tensor_parallel_size=2, **options)
    (expected,) = make_llm(**options).generate([[1, 2, 3]], params, use_tqdm=False)
    assert asyncio.run(collect(engine, [1, 2, 3], params))[-1].outputs == expected.outputs
    pid = engine._core.process.pid  # type: ignore[union-attr]
    family = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    assert len(family) > 2
    os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(is_alive, family)))
    asyncio.run(engine.shutdown())


PARENT = """
import asyncio, sys
from paged_infer import AsyncLLM, SamplingParams

async def main():
    engine = AsyncLLM(sys.argv[1], engine_process=True, device="cpu", num_blocks=64)
    print(engine._core.process.pid, flush=True)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    while True:
        _ = [output async for output in engine.generate([1, 5], params)]

if __name__ == "__main__":
    asyncio.run(main())
"""


def is_alive(pid: int) -> bool:
    """A zombie is not: nobody may be there to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_when_its_client_is_killed_it_ends_by_itself(checkpoint, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), str(checkpoint("qwen3"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    until(lambda: not is_alive(pid))
