"""Ctrl-C, held back while the books are open: a step is planned and entered whole, or not at all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off SIGINT (a notebook's stop button, too) until the end of what is inside; it then acts as it would have.

    Python raises KeyboardInterrupt between any two instructions, such as taking a block and writing down who has it.
    Only the main thread is interrupted, so elsewhere there is nothing to put off. May be nested, or decorate.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda _, frame: came.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(signal.SIGINT, came[0])
