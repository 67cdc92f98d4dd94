"""A bounded queue for long texts: one thread tokenizes them one at a time, shorter ones first (with aging)."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from paged_infer.engine.engine_client import QueueFullError

LONG_TEXT = 4096  # characters: a millisecond of tokenizing. An event loop should not be blocked for much longer
MAX_NUM_CHARACTERS = 1 << 24  # in the queue: a few seconds of tokenizing
AGING_FACTOR = 16  # see TextQueue
T = TypeVar("T")


@dataclass(order=True, slots=True)
class _Job:
    rank: int
    number: int
    function: Callable[[Any], Any] = field(compare=False)
    text: Any = field(compare=False)
    num_characters: int = field(compare=False)
    future: Future[Any] = field(compare=False)


class TextQueue:
    """Calls functions on texts in a thread of its own, the shortest text first.

    Shorter texts that arrive later may overtake a long one, but only until ``AGING_FACTOR`` times its own length has
    been processed since it arrived. So no text starves.

    Args:
        max_num_characters: the most characters in the queue, including the text being processed. An empty queue accepts
            a text of any length.
        check: called before a long text is queued; raises an error if that would be in vain.
    """

    def __init__(self, max_num_characters: int = MAX_NUM_CHARACTERS, check: Callable[[], None] = lambda: None) -> None:
        self._max_num_characters, self._check = max_num_characters, check
        self._lock = threading.Lock()
        self._jobs: list[_Job] = []  # a heap; guarded by the lock, as are the next two
        self._num_characters = 0  # waiting or being processed
        self._num_done = 0  # characters processed so far
        self._numbers = itertools.count()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def run(self, function: Callable[[Any], T], text: Any, num_characters: int) -> T:
        """``function(text)``, for a long text in the thread. Errors as ``submit``, and those of ``check``."""
        if num_characters <= LONG_TEXT:
            return function(text)
        self._check()
        return await asyncio.wrap_future(self.submit(function, text, num_characters))

    def submit(self, function: Callable[[Any], Any], text: Any, num_characters: int) -> Future[Any]:
        """A future of ``function(text)``. Cancelling it removes the text from the queue.

        Raises:
            QueueFullError: the queue would exceed ``max_num_characters``.
        """
        future: Future[Any] = Future()
        with self._lock:
            waiting = self._num_characters
            if waiting and waiting + num_characters > self._max_num_characters:
                raise QueueFullError(
                    f"{waiting} characters are waiting to be tokenized: {num_characters} more would exceed the limit "
                    f"of {self._max_num_characters}"
                )
            rank = self._num_done + AGING_FACTOR * num_characters
            job = _Job(rank, next(self._numbers), function, text, num_characters, future)
            heapq.heappush(self._jobs, job)
            self._num_characters += num_characters
        future.add_done_callback(lambda one: self._forget(job) if one.cancelled() else None)
        self._worker.submit(self._work)
        return future

    def close(self) -> None:
        """Accept no more texts; those in the queue are still processed."""
        self._worker.shutdown(wait=False)

    def _work(self) -> None:
        with self._lock:
            job = heapq.heappop(self._jobs) if self._jobs else None
        if job is None or not job.future.set_running_or_notify_cancel():
            return
        result, failure = None, None
        try:
            result = job.function(job.text)
        except BaseException as error:
            failure = error
        self._forget(job)
        if failure is None:
            job.future.set_result(result)
        else:
            job.future.set_exception(failure)

    def _forget(self, job: _Job) -> None:
        """Update the counts for a job that is done or cancelled."""
        with self._lock:
            self._num_characters -= job.num_characters
            if job.future.cancelled():
                job.text = None
            else:
                self._num_done += job.num_characters
