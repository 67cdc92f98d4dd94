"""Notices work that does not come to its end: a kernel that hangs, say."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

POLL_S = 1.0


class Watchdog:
    """Calls ``on_timeout`` once, from a thread of its own, when work takes longer than ``timeout_s``.

    Args:
        timeout_s: None for no limit; then there is no thread either.
        on_timeout: what to do.
        clock: seconds that only rise.
    """

    def __init__(
        self,
        timeout_s: float | None,
        on_timeout: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.timeout_s = timeout_s
        self.clock = clock
        self._on_timeout = on_timeout
        self._began_s: float | None = None  # the work under way
        self._over = threading.Event()
        if timeout_s is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self) -> None:
        """Work begins: from here on the time counts."""
        self._began_s = self.clock()

    def pause(self) -> None:
        """Nothing is under way until the next ``begin``."""
        self._began_s = None

    def close(self) -> None:
        """Watch no more."""
        self._over.set()

    def check(self) -> None:
        """Compare the time of the work under way with the limit; called now and then."""
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


def check_timeout(name: str, value: float | None) -> None:
    """Raises ValueError for what is neither None nor a number of seconds above 0."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: must be a finite number of seconds > 0, or None for no limit")
