"""AsyncLLM: many await one engine; whoever leaves frees its blocks, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from holding import LIMIT_S, held

from paged_infer import AsyncLLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from paged_infer.async_llm import EngineDeadError, QueueFullError
from paged_infer.engine.grammars import GrammarCache
from paged_infer.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
Scenario = Callable[[AsyncLLM], Awaitable[None]]


@pytest.fixture
def serve(checkpoint) -> Callable[..., None]:
    """Runs a scenario on a fresh engine; whatever it did, law 2 holds afterwards and every block is free."""

    def run(scenario: Scenario, model: Path | None = None, **options: Any) -> None:
        async def main() -> None:
            usual = {"max_num_seqs": 8, "num_blocks": 64, "device": "cpu"}
            async with AsyncLLM(model or checkpoint("qwen3"), **{**usual, **options}) as engine:
                await scenario(engine)
                await engine.check_integrity()
            await engine.check_integrity()
            stats = engine.stats()
            assert stats["free_blocks"] == stats["num_blocks"]

        asyncio.run(asyncio.wait_for(main(), LIMIT_S))

    return run


async def collect(engine: AsyncLLM, *arguments: Any, **options: Any) -> list[RequestOutput]:
    return [output async for output in engine.generate(*arguments, **options)]


async def last(engine: AsyncLLM, *arguments: Any, **options: Any) -> RequestOutput:
    return (await collect(engine, *arguments, **options))[-1]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def until_idle(engine: AsyncLLM) -> None:
    await until(lambda: engine.stats()["free_blocks"] == engine.stats()["num_blocks"])


def test_outputs_are_cumulative_and_the_last_one_is_finished(serve, llm) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        outputs = await collect(engine, [5, 6, 7], GREEDY)
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        assert lengths == sorted(set(lengths)) and lengths[-1] == 8
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1].outputs[0].token_ids == expected

    expected = llm.generate([5, 6, 7], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    serve(scenario)


def test_numbers_of_numpy_are_taken_and_a_batch_is_refused_by_its_shape(serve) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        assert type(engine.max_num_waiting) is int
        expected = await last(engine, [5, 6, 7], GREEDY)
        output = await last(engine, np.array([5, 6, 7]), GREEDY)
        assert (output.prompt_token_ids, output.outputs) == (expected.prompt_token_ids, expected.outputs)
        with pytest.raises(ValueError, match=r"not shape \(1, 3\)"):
            await last(engine, np.array([[5, 6, 7]]), GREEDY)

    serve(scenario, max_num_waiting=np.int64(3))


def test_many_awaiters_each_get_what_the_offline_engine_says(serve, make_llm) -> None:
    prompts = [[1 + i % 900, 2 + i % 7, *range(3, 3 + i % 23)] for i in range(60)]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=1 + i % 11, ignore_eos=True) for i in range(60)]
    offline = make_llm().generate(prompts, params, use_tqdm=False)

    async def scenario(engine: AsyncLLM) -> None:
        with held(engine):
            readers = [
                asyncio.create_task(last(engine, *pair, stream=bool(i % 3)))
                for i, pair in enumerate(zip(prompts, params, strict=True))
            ]
            await until(lambda: engine.stats()["num_waiting"] == 60)
        online = await asyncio.gather(*readers)
        assert [o.outputs[0].token_ids for o in online] == [o.outputs[0].token_ids for o in offline]
        assert engine.stats()["preemptions"] > 0

    serve(scenario, num_blocks=9, block_size=4)


def test_text_samples_and_beams_come_through(serve, text_llm, text_checkpoint) -> None:
    sampled = SamplingParams(n=3, seed=7, max_tokens=6, stop="zz")
    beams = BeamSearchParams(beam_width=3, max_tokens=6)
    by_sampling = text_llm.generate("ab cd", sampled, use_tqdm=False)[0].outputs
    by_search = text_llm.beam_search("ab cd", beams, use_tqdm=False)[0].outputs

    async def scenario(engine: AsyncLLM) -> None:
        one, other = await asyncio.gather(last(engine, "ab cd", sampled), collect(engine, "ab cd", beams))
        assert (one.prompt, one.outputs) == ("ab cd", by_sampling)
        assert len(other) == 1 and [b.token_ids for b in other[0].outputs] == [b.token_ids for b in by_search]

    serve(scenario, text_checkpoint)


@pytest.mark.parametrize("leave", ["close", "cancel", "break"])
def test_whoever_leaves_frees_its_blocks(serve, leave: str) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        with held(engine) as steps:
            steps.allow(1)
            generator = engine.generate([5, 6], LONG)
            if leave == "cancel":
                began = asyncio.Event()

                async def read() -> None:
                    async for _ in generator:
                        began.set()

                task = asyncio.create_task(read())
                await began.wait()
                assert engine.stats()["free_blocks"] < engine.stats()["num_blocks"]
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                async for _ in generator:
                    break
                assert engine.stats()["free_blocks"] < engine.stats()["num_blocks"]
                if leave == "close":
                    await generator.aclose()
                del generator  # a loop that was left by `break` aborts when the generator is collected
                gc.collect()
            await until_idle(engine)

    serve(scenario)


def test_a_request_that_is_cancelled_while_it_waits_never_runs(serve) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        with held(engine) as steps:
            running = asyncio.create_task(last(engine, [5], GREEDY))
            waiting = asyncio.create_task(last(engine, [6], LONG))
            await until(lambda: engine.stats()["num_waiting"] == 2)
            steps.run(1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            steps.allow()
            await running
            await until_idle(engine)
        assert engine.stats()["steps"] == 8

    serve(scenario, max_num_seqs=1)


def test_an_abort_from_another_thread_ends_the_readers_wait(serve) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        outputs = []
        with held(engine) as steps:
            steps.allow(1)
            async for output in engine.generate([5, 6], LONG, "mine"):
                if not outputs:
                    threading.Thread(target=engine.abort, args=("mine",)).start()
                outputs.append(output)
        end = outputs[-1]
        assert end.finished and end.outputs[0].finish_reason == "abort"
        assert len(end.outputs[0].token_ids) == 1

    serve(scenario)


def test_an_abort_of_nobody_changes_nothing(serve) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        engine.abort("nobody")
        assert len((await last(engine, [5], GREEDY)).outputs[0].token_ids) == 8

    serve(scenario)


def test_an_id_is_served_once_at_a_time_and_free_again_when_its_reader_has_left(serve) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        first = engine.generate([5], LONG, "a")
        await anext(first)
        with pytest.raises(ValueError, match="request_id='a' is already being served"):
            await last(engine, [5], GREEDY, "a")
        await first.aclose()
        assert len((await last(engine, [5], GREEDY, "a")).outputs[0].token_ids) == 8
        assert len((await last(engine, [5], GREEDY, "a")).outputs[0].token_ids) == 8

    serve(scenario)


def test_an_abort_ends_the_request_of_its_reader_and_not_the_next_of_that_id(serve) -> None:
    """Two event loops, in two threads: one leaves, and the other takes the id at that very moment."""

    async def scenario(engine: AsyncLLM) -> None:
        answers = await engine.submit([5], LONG, "a")
        abort, others = engine._core.abort, []

        def take_the_id() -> None:
            with contextlib.suppress(ValueError):  # it is not free yet
                others.append(asyncio.run(last(engine, [5], GREEDY, "a")))

        def abort_late(request_id: str) -> None:
            thread = threading.Thread(target=take_the_id)
            thread.start()
            thread.join(0.2)
            abort(request_id)
            threads.append(thread)

        threads: list[threading.Thread] = []
        engine._core.abort = abort_late  # type: ignore[method-assign]
        answers.close()
        engine._core.abort = abort  # type: ignore[method-assign]
        await asyncio.to_thread(threads[0].join)
        assert [len(other.outputs[0].token_ids) for other in others] == [8]

    serve(scenario)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "the prompt is empty"), ([5000], "5000"), ([1] * 600, "max_model_len"), ("text", "no tokenizer")],
)
def test_bad_input_costs_only_its_own_caller(serve, prompt: Any, message: str) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        other = asyncio.create_task(last(engine, [5], GREEDY))
        with pytest.raises(ValueError, match=message):
            await last(engine, prompt, GREEDY)
        assert len((await other).outputs[0].token_ids) == 8

    serve(scenario)


def test_a_failing_step_reaches_everybody_and_whoever_comes_later(serve) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        steps = engine._core.engine.executor.runner
        launch, count = steps.launch, 0

        def fail(step: Any) -> Any:
            nonlocal count
            count += 1
            if count == 5:
                raise ArithmeticError("the device fell off")
            return launch(step)

        steps.launch = fail
        ends = await asyncio.gather(
            *(last(engine, [i + 1], LONG, stream=bool(i % 2)) for i in range(20)), return_exceptions=True
        )
        assert all(isinstance(end, EngineDeadError) for end in ends), ends
        assert all("the device fell off" in str(end) for end in ends)
        assert isinstance(ends[0].__cause__, ArithmeticError) and len({id(end) for end in ends}) == 20
        assert engine.error is not None
        with pytest.raises(EngineDeadError, match="the device fell off"):
            await last(engine, [5], GREEDY)
        assert engine.stats()["free_blocks"] == engine.stats()["num_blocks"]

    serve(scenario)


def test_the_queue_is_bounded(serve) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        with held(engine) as steps:
            steps.allow(1)
            running = engine.generate([5], LONG)
            await anext(running)
            waiting = [await engine.submit([6], GREEDY) for _ in range(3)]
            with pytest.raises(QueueFullError, match="max_num_waiting=3"):
                await engine.submit([6], GREEDY)
            await running.aclose()
        ends = [[output async for output in answers][-1] for answers in waiting]
        assert [len(end.outputs[0].token_ids) for end in ends] == [8] * 3
        await last(engine, [6], GREEDY)  # and open again

    serve(scenario, max_num_seqs=1, max_num_waiting=3)


@pytest.mark.parametrize("bound", [0, True, 1.5])
def test_a_queue_must_have_a_place(bound: Any) -> None:
    with pytest.raises(ValueError, match="max_num_waiting"):
        AsyncLLM(max_num_waiting=bound)


def test_an_idle_engine_sleeps_until_it_is_woken(serve) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        wake, waits = engine._core._wake, list[float | None]()
        wait = wake.wait

        def watched(timeout: float | None = None) -> bool:
            waits.append(timeout)
            return wait(timeout)

        wake.wait = watched  # type: ignore[method-assign]
        for _ in range(3):
            num_waits = len(waits)
            await last(engine, [5], GREEDY)
            await until(lambda num=num_waits: len(waits) > num)
        assert waits in ([None] * 3, [None] * 4), "it looks for work when it is woken, and not now and then"

    serve(scenario)


def test_what_a_step_tells_one_loop_crosses_in_one_call(serve) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        loop = asyncio.get_running_loop()
        calls, call_soon_threadsafe = [], loop.call_soon_threadsafe

        def counted(*arguments: Any, **options: Any) -> Any:
            calls.append(arguments)
            return call_soon_threadsafe(*arguments, **options)

        with held(engine):
            readers = [asyncio.create_task(last(engine, [i + 1], GREEDY)) for i in range(8)]
            await until(lambda: engine.stats()["num_waiting"] == 8)
            loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        await asyncio.gather(*readers)
        loop.call_soon_threadsafe = call_soon_threadsafe  # type: ignore[method-assign]
        assert len(calls) == engine.stats()["steps"] == 8

    serve(scenario)


def test_a_reader_that_does_not_keep_up_gets_the_newest_and_costs_no_memory(serve) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        answers = await engine.submit([5], GREEDY)
        channel = answers._channel
        await until(lambda: isinstance(channel.latest, RequestOutput) and channel.latest.finished)
        outputs = [output async for output in answers]
        assert len(outputs) == 1 and len(outputs[0].outputs[0].token_ids) == 8

    serve(scenario)


def test_a_batch_that_waits_to_be_filled_begins_as_soon_as_it_is(serve) -> None:
    from paged_infer.control.policies import Dynamic

    async def scenario(engine: AsyncLLM) -> None:
        waits, sleep = threading.Event(), engine._core._sleep

        def watched(seconds: float) -> None:
            waits.set()
            sleep(seconds)

        engine._core._sleep = watched  # type: ignore[method-assign]
        first = asyncio.create_task(last(engine, [5], GREEDY))
        await until(waits.is_set)
        assert not first.done()
        await asyncio.gather(first, last(engine, [6], GREEDY))  # in less than LIMIT_S

    policy = Dynamic(window_s=100 * LIMIT_S, max_batch_size=2)
    serve(scenario, scheduling_policy=policy, max_num_batched_tokens=2048)


def test_shutdown_lets_finish_what_runs_when_asked_to(serve) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        running = [asyncio.create_task(last(engine, [i + 1], GREEDY)) for i in range(20)]
        await asyncio.sleep(0)
        await engine.shutdown(finish=True)
        assert {(await one).outputs[0].finish_reason for one in running} == {"length"}
        with pytest.raises(EngineDeadError, match="shut down"):
            await last(engine, [5], GREEDY)

    serve(scenario)


@pytest.mark.parametrize("options", [{"finish": False}, {"finish": True, "timeout_s": 0.05}])
def test_shutdown_ends_what_may_not_finish(serve, options: dict[str, Any]) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        with held(engine) as steps:
            running = [asyncio.create_task(last(engine, [i + 1], LONG)) for i in range(40)]
            await until(lambda: engine.stats()["num_waiting"] == 40)
            steps.run(1)
            assert engine.stats()["num_running"] == 8
            await engine.shutdown(**options)
        assert {(await one).outputs[0].finish_reason for one in running} == {"abort"}

    serve(scenario)


def test_an_engine_that_nobody_holds_any_more_ends_its_thread(checkpoint) -> None:
    engine = AsyncLLM(checkpoint("qwen3"), num_blocks=64, device="cpu")
    thread = engine._core
    del engine
    gc.collect()
    assert thread.ended.wait(LIMIT_S)


def test_readers_whose_loop_has_gone_are_aborted(checkpoint) -> None:
    engine = AsyncLLM(checkpoint("qwen3"), num_blocks=64, device="cpu")

    async def begin() -> None:
        answers = await engine.submit([5], LONG)
        await anext(answers)

    with held(engine) as steps:
        steps.allow(1)
        asyncio.run(begin())  # the loop ends without an abort
        steps.run(1)  # its output has no reader
        assert engine.stats()["free_blocks"] == engine.stats()["num_blocks"]
    asyncio.run(engine.check_integrity())
    asyncio.run(engine.shutdown())


def test_readers_of_several_loops_are_served_side_by_side(checkpoint) -> None:
    engine = AsyncLLM(checkpoint("qwen3"), num_blocks=64, device="cpu")
    said: list[list[int]] = []

    def ask() -> None:
        said.append(asyncio.run(last(engine, [5, 6], GREEDY)).outputs[0].token_ids)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert len(said) == 6 and all(one == said[0] for one in said)
    asyncio.run(engine.shutdown())


def test_observers_hear_of_every_token_and_one_that_fails_costs_nobody_anything(serve) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        tokens: list[int] = []
        ends: list[str] = []

        def watch(report: Any) -> None:
            tokens.extend(sequence.sequence_id for sequence in report.grown)
            ends.extend(output.request_id for output in report.outputs if output.finished)

        def fail(report: Any) -> None:
            raise ArithmeticError

        engine.observers.extend([fail, watch])
        await asyncio.gather(last(engine, [5], GREEDY, "a"), last(engine, [6], GREEDY, "b", stream=False))
        await engine.run(lambda _: None)  # the observers have heard of the last step, too
        assert len(tokens) == 16 and sorted(ends) == ["a", "b"]
        assert engine.observers == [watch]

    serve(scenario)


def test_a_storm_of_readers_that_leave_at_any_moment_leaves_nothing_behind(serve) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        async def fickle(i: int) -> None:
            with contextlib.suppress(TimeoutError, QueueFullError):
                async with asyncio.timeout(0.003 * (i % 50)):
                    await last(engine, [1 + i % 900, 7], LONG, stream=bool(i % 2))

        await asyncio.gather(*(fickle(i) for i in range(200)))
        await until_idle(engine)
        await engine.check_integrity()
        assert engine.stats()["num_waiting"] == engine.stats()["num_running"] == 0
        assert not engine._streams and not engine._core._channels

    serve(scenario, max_num_waiting=100)


def test_a_long_text_is_tokenized_beside_the_event_loop(serve, text_checkpoint) -> None:
    async def scenario(engine: AsyncLLM) -> None:
        go_on, encode = threading.Event(), engine.tokenizer.encode

        def slow(text: str) -> list[int]:
            assert text != long_text or go_on.wait(LIMIT_S)
            return encode(text)

        engine.tokenizer.encode = slow  # type: ignore[method-assign]
        cut = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, truncate_prompt_tokens=20)
        long = asyncio.create_task(last(engine, long_text, cut))
        await asyncio.gather(*(last(engine, "ab cd", GREEDY) for _ in range(7)))
        assert not long.done()
        go_on.set()
        assert len((await long).outputs[0].token_ids) == 8

    long_text = "ab ba " * 20000
    serve(scenario, text_checkpoint)


def test_the_engine_thread_is_gone_when_the_interpreter_ends(tmp_path) -> None:
    """In a process of its own: leaves in mid-generation, and must neither hang nor crash."""
    script = (
        "import asyncio\n"
        "from paged_infer import AsyncLLM, SamplingParams\n"
        "engine = AsyncLLM(num_blocks=128)\n"
        "async def main():\n"
        "    async for output in engine.generate('Once', SamplingParams(max_tokens=900, ignore_eos=True)):\n"
        "        print('one output'); return\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stdout) == (0, "one output\n"), done.stderr


def test_a_grammar_is_compiled_once_and_outside_the_event_loop(serve, text_checkpoint, monkeypatch) -> None:
    """A large one, or the first with a large vocabulary, takes longer than others may wait for the loop."""
    threads: list[str] = []

    def compiling(self: GrammarCache, asked: Any) -> Any:
        threads.append(threading.current_thread().name)
        return compile_one(self, asked)

    async def scenario(engine: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=9, structured_outputs=StructuredOutputsParams(choice=["ab", "ba"]))
        for output in await asyncio.gather(*(last(engine, "ab", params) for _ in range(2))):
            assert output.outputs[0].text in ("ab", "ba")
        broken = SamplingParams(structured_outputs=StructuredOutputsParams(regex="("))
        with pytest.raises(ValueError, match="structured_outputs: regex: "):
            await last(engine, "ab", broken)

    compile_one = GrammarCache._compile
    monkeypatch.setattr(GrammarCache, "_compile", compiling)
    serve(scenario, text_checkpoint)
    assert len(threads) == 2 and all(name.startswith("tokenizer") for name in threads), threads
