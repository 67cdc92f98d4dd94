"""Interrupts: a stop button that is pressed at any moment costs nobody a block."""

from __future__ import annotations

import contextlib
import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
from effort import EFFORT

from paged_infer import LLM, BeamSearchParams, SamplingParams
from paged_infer.engine.defer_sigint import defer_sigint, interruptible

PROMPTS = [[30 + i] * (3 + i) for i in range(4)]
GREEDY = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
BOOKS = ("/control/", "/engine.py", "/completion.py", "/llm.py", "/interrupts.py")


@pytest.fixture(autouse=True)
def pythons_own_handler() -> Iterator[None]:
    """A shell starts what it runs in the background with SIGINT ignored; then there is nothing to test."""
    before, trace = signal.signal(signal.SIGINT, signal.default_int_handler), sys.gettrace()
    yield
    signal.signal(signal.SIGINT, before)
    assert sys.gettrace() is trace


class PressedAt:
    """Counts the lines that the engine runs outside the model, and sends SIGINT at some of them."""

    def __init__(self, *lines: int) -> None:
        self.lines = lines
        self.num_lines = 0

    def __enter__(self) -> PressedAt:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not any(part in frame.f_code.co_filename for part in BOOKS):
            return None
        if event == "line":
            self.num_lines += 1
            if self.num_lines in self.lines:
                signal.raise_signal(signal.SIGINT)
        return self._trace


def said(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_an_interrupt_at_any_line_leaves_nothing_behind(mode, make_llm) -> None:
    llm = make_llm("gpt2-untied", num_blocks=8, block_size=3, preemption_mode=mode)
    undisturbed = said(llm)
    with PressedAt() as counted:
        assert said(llm) == undisturbed
    assert llm.stats()["preemptions"] > 0
    for line in range(1, counted.num_lines, counted.num_lines // 97):
        with pytest.raises(KeyboardInterrupt), PressedAt(line):
            said(llm)
        llm.check_integrity()
        stats = llm.stats()
        assert stats["free_blocks"] == stats["num_blocks"]
        assert not stats["num_waiting"] + stats["num_running"] + stats["num_swapped"]
    assert said(llm) == undisturbed


def is_idle(llm: LLM) -> bool:
    llm.check_integrity()
    stats = llm.stats()
    is_free = stats["free_blocks"] == stats["num_blocks"] and not llm.engine.has_unfinished_requests
    return is_free and not stats["num_waiting"] + stats["num_running"] + stats["num_swapped"]


def beams(llm: LLM) -> list[list[int]]:
    params = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
    return [one.token_ids for one in llm.beam_search(PROMPTS[1], params, use_tqdm=False)[0].outputs]


def streamed(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.stream(PROMPTS[3], GREEDY)]


@pytest.mark.parametrize("gap", [1, 4, 25])
@pytest.mark.parametrize("work", [said, beams, streamed])
def test_a_second_interrupt_while_the_first_unwinds_leaves_nothing_behind(work, gap, make_llm) -> None:
    llm = make_llm("gpt2-untied", num_blocks=12, block_size=3)
    undisturbed = work(llm)
    with PressedAt() as counted:
        work(llm)
    for line in range(1, counted.num_lines + 1, max(1, counted.num_lines // (4 * EFFORT))):
        with contextlib.suppress(KeyboardInterrupt), PressedAt(line, line + gap):
            work(llm)
        gc.collect()  # a generator that was interrupted is closed when it is collected
        assert is_idle(llm), line
    assert work(llm) == undisturbed


@pytest.mark.parametrize("work", [said, beams, streamed])
def test_two_interrupts_where_a_step_computes_leave_nothing_behind(work, make_llm, monkeypatch) -> None:
    """The first acts within the forward pass, the second as soon as its exception has left that."""
    llm = make_llm("gpt2-untied", num_blocks=12, block_size=3)
    undisturbed, launch = work(llm), llm.engine.executor.runner.launch
    for at_launch in (0, 3):
        for second_at in range(1, 30, 1 + 7 // EFFORT):
            launches, presses = [], PressedAt(second_at)

            def interrupted(step: Any, at=at_launch, launches=launches, presses=presses) -> Any:
                launches.append(step)
                if len(launches) == at + 1:
                    presses.__enter__()  # the lines that run during unwinding
                    sys._getframe().f_back.f_trace = presses._trace
                    signal.raise_signal(signal.SIGINT)
                return launch(step)

            monkeypatch.setattr(llm.engine.executor.runner, "launch", interrupted)
            with contextlib.suppress(KeyboardInterrupt):
                work(llm)
            presses.__exit__()
            monkeypatch.setattr(llm.engine.executor.runner, "launch", launch)
            gc.collect()
            assert is_idle(llm), (at_launch, second_at)
    assert work(llm) == undisturbed


def test_an_abandoned_stream_ends_with_the_next_call(make_llm) -> None:
    llm = make_llm()
    stream = llm.stream(PROMPTS[3], GREEDY)
    next(stream)
    llm._is_stepping = True  # as where a collection finds it in the middle of a step
    del stream
    llm._is_stepping = False
    assert llm.engine.has_unfinished_requests
    assert said(llm) == said(llm) and is_idle(llm)


def test_an_interrupt_acts_at_once_where_it_is_allowed_and_then_no_more() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), defer_sigint():
        try:
            with interruptible():
                signal.raise_signal(signal.SIGINT)
                reached.append("never")
        finally:
            signal.raise_signal(signal.SIGINT)
            reached.append("unwound")
    assert reached == ["unwound"]


def test_one_that_has_come_before_acts_where_it_is_allowed() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), defer_sigint():
        signal.raise_signal(signal.SIGINT)
        reached.append("noted")
        with interruptible():
            reached.append("never")
    assert reached == ["noted"]


def test_a_handler_of_ones_own_that_raises_nothing_is_called_each_time(monkeypatch) -> None:
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    try:
        with defer_sigint():
            signal.raise_signal(signal.SIGINT)
            with interruptible():
                assert calls == [1]
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            assert calls == [1, 1, 1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_end_and_comes_once() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), defer_sigint():
        with defer_sigint():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            reached.append("inside")
        reached.append("outside")
    assert reached == ["inside", "outside"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_there_is_nothing_to_put_off_in_another_thread() -> None:
    handlers = []

    def work() -> None:
        with defer_sigint():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


PRESSED_WHILE_NUMPY_IS_IMPORTED = """
import sys

class Press:
    def find_spec(self, name, *_):
        if name == "numpy":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Press())
import paged_infer.llm
"""


def test_ctrl_c_during_the_imports_is_not_lost() -> None:
    command = [sys.executable, "-c", PRESSED_WHILE_NUMPY_IS_IMPORTED]
    assert subprocess.run(command, stderr=subprocess.PIPE).returncode == -signal.SIGINT
