"""Defer Ctrl-C while the engine's state changes: a step is planned and recorded whole, or not at all.

defer_sigint()                   SIGINT is recorded, and acts when the outermost of these ends
  interruptible()                 where no state changes (a forward pass, a sleep): it acts immediately
    KeyboardInterrupt  ---->      from here on it is deferred again, so a second one cannot interrupt the ``finally``
                                  blocks of the first
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Deferral:
    """The SIGINT handler within ``defer_sigint``. ``act`` is the handler that it replaces."""

    def __init__(self, act: Callable[[int, FrameType | None], Any]) -> None:
        self.act = act
        self.is_open = False
        self.came = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if not self.is_open:
            self.came = True
            return
        self.is_open = False  # before the handler raises: the unwinding must not be interrupted
        self.act(signum, frame)
        self.is_open = True  # the application's own handler raised nothing


@contextmanager
def defer_sigint() -> Iterator[Deferral]:
    """Defer SIGINT (also from a notebook's stop button) to the end of the block; then the usual handler runs.

    Yields the ``Deferral``; its ``came`` is true once a SIGINT is pending. Python raises KeyboardInterrupt between any
    two instructions, such as allocating a block and recording its owner. Only the main thread is interrupted; in other
    threads this does nothing. Can be nested, and can be used as a decorator.
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
    """Within ``defer_sigint``: let SIGINT, also a pending one, act immediately, until the first one raises."""
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
