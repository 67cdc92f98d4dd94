"""The progress bar of ``LLM.generate``: finished requests, and tokens per second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

DELAY_S = 0.5  # shorter calls show no bar


class Progress:
    """A bar on standard error if that is a terminal or a notebook, but not if it is a file or a pipe.

    It is drawn at most ten times a second, however short the steps are.
    """

    def __init__(
        self, num_requests: int, shown: bool, delay_s: float = DELAY_S, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        from tqdm.auto import tqdm

        is_watched = "ipykernel" in sys.modules or sys.stderr.isatty()
        self._clock, self._began_s, self._num_tokens = clock, clock(), 0
        disable = not (shown and is_watched)
        self._bar = tqdm(total=num_requests, desc="requests", unit="req", disable=disable, delay=delay_s, miniters=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, num_finished: int, num_tokens: int) -> None:
        """Call after each step, with the numbers of requests that it finished and of their tokens."""
        if self._bar.disable:
            return
        self._num_tokens += num_tokens
        elapsed_s = max(self._clock() - self._began_s, 1e-9)
        self._bar.set_postfix_str(f"{self._num_tokens / elapsed_s:,.0f} tokens/s", refresh=False)
        self._bar.update(num_finished)
