"""The progress bar: tokens per second for a reader, and not a byte for a file."""

from __future__ import annotations

import io
import itertools
import sys
from contextlib import redirect_stderr

import pytest

from paged_infer.engine.progress import Progress


class Terminal(io.StringIO):
    def __init__(self, is_tty: bool) -> None:
        super().__init__()
        self.is_tty = is_tty

    def isatty(self) -> bool:
        return self.is_tty


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    """For standard error, in a process without a notebook, at a clock by which each reading is 0.01 s later."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    clock = itertools.count()
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock) / 100)
    return Terminal(is_tty=True)


def run(terminal: Terminal, num_steps: int, delay_s: float = 0.0, shown: bool = True) -> None:
    """Four requests in so many steps of 8 tokens, 0.01 s each, that all end in the last one."""
    clock = itertools.count()
    with redirect_stderr(terminal), Progress(4, shown, delay_s, lambda: next(clock) / 100) as bar:
        for step in range(num_steps):
            bar.update(4 * (step == num_steps - 1), 8)


def test_the_bar_counts_requests_and_tokens_per_second(terminal: Terminal) -> None:
    run(terminal, 200)
    shown = terminal.getvalue()
    assert "requests:   0%" in shown and "requests: 100%" in shown and "4/4" in shown
    assert "800 tokens/s" in shown


def test_while_no_request_has_finished_the_bar_is_drawn_ten_times_a_second_at_most(terminal: Terminal) -> None:
    run(terminal, 1000)
    assert 10 < terminal.getvalue().count("\r") <= 110


def test_nothing_is_written_to_a_file_for_a_short_call_or_without_use_tqdm(terminal: Terminal) -> None:
    run(terminal, 20, delay_s=10.0)
    run(terminal, 200, shown=False)
    terminal.is_tty = False
    run(terminal, 200)
    assert terminal.getvalue() == ""


def test_generate_writes_nothing_to_a_file(llm, monkeypatch) -> None:
    file = Terminal(is_tty=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    with redirect_stderr(file):
        llm.generate([[5, 6], [7]])
    assert file.getvalue() == ""
