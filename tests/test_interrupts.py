"""Interrupts: a stop button that is pressed at any moment costs nobody a block."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

import pytest

from paged_infer import LLM, SamplingParams
from paged_infer.interrupts import uninterrupted

PROMPTS = [[30 + i] * (3 + i) for i in range(4)]
GREEDY = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
BOOKS = ("/control/", "/engine.py", "/completion.py")


class PressedAt:
    """Counts the lines that the engine runs outside the model, and sends SIGINT at one of them."""

    def __init__(self, line: int | None = None) -> None:
        self.line = line
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
            if self.num_lines == self.line:
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


def test_an_interrupt_waits_for_the_end_and_comes_once() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            reached.append("inside")
        reached.append("outside")
    assert reached == ["inside", "outside"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_there_is_nothing_to_put_off_in_another_thread() -> None:
    handlers = []

    def work() -> None:
        with uninterrupted():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
