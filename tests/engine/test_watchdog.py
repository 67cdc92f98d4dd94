"""A step that does not return: every request ends with an error, nothing waits for it; a slow step is no hang."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from holding import HeldStep

from paged_infer import AsyncLLM, SamplingParams
from paged_infer.async_llm import EngineDeadError
from paged_infer.engine.watchdog import Watchdog
from paged_infer.server.app import create_app

SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


class Clock:
    """Set by hand, and with it the engine's watchdog."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.now_s = 0.0
        self._watchdog = engine._core.watchdog
        self._watchdog.clock = lambda: self.now_s

    def go_to(self, now_s: float) -> None:
        self.now_s = now_s
        self._watchdog.check()


@asynccontextmanager
async def engine_and_clock(folder: Any, **options: Any) -> AsyncIterator[tuple[AsyncLLM, Clock]]:
    engine = AsyncLLM(folder, num_blocks=64, device="cpu", **options)
    yield engine, Clock(engine)
    await engine.shutdown()
    await asyncio.to_thread(engine._core._thread.join)
    assert engine.stats()["free_blocks"] == engine.stats()["num_blocks"]


async def last(engine: AsyncLLM, *arguments: Any, **options: Any) -> Any:
    return [output async for output in engine.generate(*arguments, **options)][-1]


def played(scenario: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_a_step_that_does_not_return_is_told_to_everybody_who_waits(checkpoint) -> None:
    async def scenario() -> None:
        async with engine_and_clock(checkpoint("qwen3"), step_timeout=600) as (engine, clock):
            held = HeldStep(engine)
            waiting = [asyncio.create_task(last(engine, [5], SHORT, stream=bool(i % 2))) for i in range(3)]
            await asyncio.to_thread(held.began.wait)
            waiting.append(asyncio.create_task(last(engine, [6], SHORT)))  # comes while the step hangs
            waiting.append(asyncio.create_task(engine.check_integrity()))
            await asyncio.sleep(0)
            clock.go_to(600.0)
            assert engine.error is None
            clock.go_to(600.1)
            ends = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(end, EngineDeadError) and "step_timeout=600" in str(end) for end in ends), ends
            for later in (last(engine, [5], SHORT), engine.check_integrity()):
                with pytest.raises(EngineDeadError, match="step_timeout=600"):
                    await later
            await engine.shutdown()  # does not wait for it
            assert engine.is_abandoned and not engine._core.ended.is_set()
            held.let_go()

    played(scenario)


def test_health_is_503_once_a_step_has_taken_too_long(checkpoint) -> None:
    async def scenario() -> None:
        async with engine_and_clock(checkpoint("qwen3"), step_timeout=600) as (engine, clock):
            transport = httpx.ASGITransport(create_app(engine))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                held = HeldStep(engine)
                body = {"prompt": [5], "max_tokens": 4}
                asked = asyncio.create_task(client.post("/v1/completions", json=body))
                await asyncio.to_thread(held.began.wait)
                assert (await client.get("/health")).status_code == 200
                clock.go_to(601.0)
                health, answer = await client.get("/health"), await asked
                assert (health.status_code, answer.status_code) == (503, 500)
                for response in (health, answer):
                    assert response.json()["error"]["code"] == "engine_dead"
                assert (await client.get("/events")).text.endswith("data: {}\n\n")  # closed at once
            held.let_go()

    played(scenario)


def test_a_slow_step_in_time_and_an_idle_engine_are_no_failure(checkpoint) -> None:
    async def scenario() -> None:
        async with engine_and_clock(checkpoint("qwen3"), step_timeout=10) as (engine, clock):
            clock.go_to(1000.0)  # idle since 0
            held = HeldStep(engine)
            waiting = asyncio.create_task(last(engine, [5], SHORT))
            await asyncio.to_thread(held.began.wait)
            clock.go_to(1010.0)
            held.let_go()
            assert len((await waiting).outputs[0].token_ids) == 4
            assert engine.error is None and not engine.is_abandoned

    played(scenario)


def test_a_policy_that_waits_for_its_batch_is_no_step_that_hangs(checkpoint) -> None:
    from paged_infer.control.policies import Dynamic

    async def scenario() -> None:
        policy = Dynamic(window_s=3000, max_batch_size=2)
        options = {"scheduling_policy": policy, "max_num_batched_tokens": 2048, "step_timeout": 10}
        async with engine_and_clock(checkpoint("qwen3"), **options) as (engine, clock):
            naps, wake, loop = asyncio.Event(), engine._core._wake, asyncio.get_running_loop()
            wait = wake.wait

            def nap(seconds: float | None = None) -> bool:
                if seconds is not None:
                    loop.call_soon_threadsafe(naps.set)
                return wait(seconds)

            wake.wait = nap  # type: ignore[method-assign]
            first = asyncio.create_task(last(engine, [5], SHORT))
            await naps.wait()
            clock.go_to(1000.0)
            second = await last(engine, [6], SHORT)
            assert engine.error is None
            assert len((await first).outputs[0].token_ids) == len(second.outputs[0].token_ids) == 4

    played(scenario)


def test_shutdown_does_not_wait_for_a_step_that_does_not_return(checkpoint) -> None:
    async def scenario() -> None:
        async with engine_and_clock(checkpoint("qwen3"), step_timeout=None) as (engine, _):
            held = HeldStep(engine)
            waiting = asyncio.create_task(last(engine, [5], SHORT))
            await asyncio.to_thread(held.began.wait)
            await engine.shutdown(finish=True, timeout_s=0.01, last_step_s=0.01)
            with pytest.raises(EngineDeadError, match="did not return"):
                await waiting
            held.let_go()

    played(scenario)


def test_a_watchdog_calls_once_from_a_thread_of_its_own() -> None:
    called = threading.Semaphore(0)
    watchdog = Watchdog(0.001, lambda: called.release() or None)
    watchdog.begin()
    assert called.acquire(timeout=60)
    watchdog.check()
    assert not called.acquire(blocking=False)


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), "5", True])
def test_a_step_timeout_is_a_number_of_seconds(value: Any) -> None:
    with pytest.raises(ValueError, match="step_timeout="):
        AsyncLLM(step_timeout=value)
