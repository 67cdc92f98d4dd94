"""The thread of an engine: whatever fails, each reader and each caller gets an answer."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from holding import LIMIT_S

from paged_infer.control.request import Request
from paged_infer.engine.engine_thread import EngineThread
from paged_infer.engine.output_channel import OutputChannel
from paged_infer.execution.errors import EngineDeadError
from paged_infer.params import SamplingParams


def broken(*_: object, **__: object) -> None:
    raise ArithmeticError("no such table")


def engine_that_cannot_queue() -> Any:
    return SimpleNamespace(
        executor=SimpleNamespace(on_death=lambda _: None),
        scheduler=SimpleNamespace(waiting=[], trace=None),
        requests=SimpleNamespace(by_id={}),
        has_unfinished_requests=False,
        submit=broken,
        abort=lambda _: None,
        shutdown=lambda: None,
    )


def test_a_command_that_fails_leaves_none_of_those_behind_it_without_an_answer() -> None:
    thread, go_on = EngineThread(engine_that_cannot_queue(), max_num_waiting=8), threading.Event()
    thread.call(lambda _: go_on.wait(LIMIT_S))

    async def main() -> None:
        channels = [OutputChannel(asyncio.get_running_loop()) for _ in range(3)]
        for index, channel in enumerate(channels):
            thread.add(Request(f"r{index}", None, [5], SamplingParams(), 0.0), channel, streamed=True)
        answer = thread.call(lambda _: "answered")
        go_on.set()
        for channel in channels:
            with pytest.raises(EngineDeadError, match="the engine has failed: ArithmeticError: no such table"):
                await asyncio.wait_for(channel.get(), LIMIT_S)
        assert answer.result(LIMIT_S) == "answered"

    asyncio.run(main())
    assert thread.join(LIMIT_S) and not thread._channels and not thread._answers
    assert thread.call(lambda _: 3).result() == 3, "later calls run here"


def test_a_thread_does_not_wait_for_itself() -> None:
    thread = EngineThread(engine_that_cannot_queue(), max_num_waiting=8)
    assert thread.call(lambda _: thread.join()).result(LIMIT_S) is False
    thread.stop()
    assert thread.join(LIMIT_S)
