"""Hold an engine that runs in a thread at a step, so that a test can observe its state; end a test that hangs."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from paged_infer import AsyncLLM
from paged_infer.engine.engine import LLMEngine
from paged_infer.engine.request_states import StepReport

LIMIT_S = 300.0  # ends a test that hangs; a passing one finishes long before, even on a slow and busy machine


def until(condition: Callable[[], Any], state: Callable[[], Any] = lambda: None) -> None:
    """Return as soon as ``condition()`` holds. Only for what is certain to come: ``LIMIT_S`` ends a hang.

    Raises:
        AssertionError: it has not come; the message is ``state()``.
    """
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, state()
        time.sleep(0.005)


class Hangs(BaseException):
    """A test does not end. No ``Exception``: Hypothesis would run such an example again."""


@contextlib.contextmanager
def ended_after(limit_s: float) -> Iterator[None]:
    """Raise ``Hangs`` in the main thread after ``limit_s``, also where it waits for a lock."""

    def end(*_: object) -> None:
        raise Hangs(f"not ended after {limit_s:g} s")

    previous = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class Steps:
    """The steps that an engine may run: none but those that are allowed. See ``held``."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._thread = engine._core
        self._engine = engine._core.engine
        self._num_allowed: float = 0  # changed on the engine's thread alone

    def allow(self, num: float = math.inf) -> None:
        """Let it run ``num`` more steps."""

        def add(_: LLMEngine) -> None:
            self._num_allowed += num

        self._thread.call(add).result(LIMIT_S)

    def run(self, num: int) -> None:
        """Let it run ``num`` more steps, and wait until it has."""
        self.allow(num)
        until(lambda: self._num_allowed < 1, self._engine.stats)
        self._thread.call(lambda _: None).result(LIMIT_S)  # after the last of them

    def _step(self, sleep: Callable[[float], object], step: Callable[..., Any]) -> Any:
        if self._num_allowed < 1:
            sleep(LIMIT_S)  # ends when a command comes, as where a policy waits for a batch to fill
            return StepReport()
        self._num_allowed -= 1
        return step(sleep)


@contextlib.contextmanager
def held(engine: AsyncLLM) -> Iterator[Steps]:
    """Until the end of the block, ``engine`` runs only allowed steps; it still carries out commands."""
    steps, step = Steps(engine), engine._core.engine.step

    def replace(one: LLMEngine) -> None:
        one.step = lambda sleep: steps._step(sleep, step)  # type: ignore[method-assign]

    engine._core.call(replace).result(LIMIT_S)
    try:
        yield steps
    finally:
        engine._core.call(lambda one: vars(one).pop("step")).result(LIMIT_S)


class HeldStep:
    """A kernel that hangs: the engine's next ``launch`` sets ``began``, and returns after ``let_go``."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.began, self._released = threading.Event(), threading.Event()
        runner = engine._core.engine.executor.runner
        launch = runner.launch

        def held(step: Any) -> Any:
            self.began.set()
            self._released.wait()
            return launch(step)

        runner.launch = held  # type: ignore[method-assign]

    def let_go(self) -> None:
        self._released.set()
