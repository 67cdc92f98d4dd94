"""Detects work that does not return, such as a kernel that hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

POLL_S = 1.0


class Watchdog:
    """Calls ``on_timeout`` once, from a thread of its own, when work takes longer than ``timeout_s``.

    Args:
        timeout_s: None: no limit, and no thread.
        on_timeout: called once, from the watchdog's thread.
        clock: monotonic time in seconds.
    """

    def __init__(
        self, timeout_s: float | None, on_timeout: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.timeout_s = timeout_s
        self.clock = clock
        self._on_timeout = on_timeout
        self._began_s: float | None = None  # when the current work began
        self._over = threading.Event()
        if timeout_s is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self) -> None:
        """Work begins: start the timer."""
        self._began_s = self.clock()

    def pause(self) -> None:
        """Stop the timer until the next ``begin``."""
        self._began_s = None

    def close(self) -> None:
        """End the watchdog."""
        self._over.set()

    def check(self) -> None:
        """Call ``on_timeout`` if the current work has exceeded the limit; called periodically."""
        began_s = self._began_s
        if self.timeout_s is None or began_s is None or self._over.is_set():
            return
        if self.clock() - began_s > self.timeout_s:
            self.close()
            self._on_timeout()

    def _watch(self) -> None:
        assert self.timeout_s is not None
        while not self._over.wait(min(POLL_S, self.timeout_s)):
            self.check()
