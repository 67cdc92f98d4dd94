"""Ctrl-C, held back while the books are open: a step is planned and entered whole, or not at all.

uninterrupted()                   SIGINT is noted, and acts when the outermost of these ends
  interruptible()                 where nothing is open (a forward pass, a sleep): it acts at once
    KeyboardInterrupt  ---->      from here on it is noted again, so a second one does not meet the first one's
                                  ``finally`` and leave the books half closed
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Deferral:
    """The handler of SIGINT while something is uninterrupted. ``act``: the handler that it stands in for."""

    def __init__(self, act: Callable[[int, FrameType | None], Any]) -> None:
        self.act = act
        self.is_open = False
        self.came = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if not self.is_open:
            self.came = True
            return
        self.is_open = False  # before anything is raised: what unwinds is not interrupted
        self.act(signum, frame)
        self.is_open = True  # a handler of the application's that raises nothing


@contextmanager
def uninterrupted() -> Iterator[Deferral]:
    """Put off SIGINT (a notebook's stop button, too) until the end of what is inside; it then acts as it would have.

    Yields the deferral, whose ``came`` is true when there is one to act on. Python raises KeyboardInterrupt between any
    two instructions, such as taking a block and writing down its owner. Only the main thread is interrupted, so
    elsewhere there is nothing to put off. May be nested, or decorate.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield Deferral(lambda *_: None)
        return
    if isinstance(handler, Deferral):
        was_open, handler.is_open = handler.is_open, False
        try:
            yield handler
        finally:
            _set_open(handler, was_open)
        return
    deferral = Deferral(handler)
    signal.signal(signal.SIGINT, deferral)
    try:
        yield deferral
    finally:
        signal.signal(signal.SIGINT, handler)
        if deferral.came:
            handler(signal.SIGINT, None)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within ``uninterrupted``: let SIGINT act again, one that has come meanwhile at once, until the first one does."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not isinstance(handler, Deferral):
        yield
        return
    try:
        _set_open(handler, True)
        yield
    finally:
        handler.is_open = False


def _set_open(handler: Deferral, is_open: bool) -> None:
    if is_open and handler.came:
        handler.came = False
        handler.is_open = True
        handler(signal.SIGINT, None)
    handler.is_open = is_open
