"""What ``AsyncLLM`` uses of an engine, wherever it runs (vLLM: EngineCoreClient).

EngineThread     in this process, in a thread of its own
EngineProcess    in a process of its own; PrefillDecode: in two, one of them for prompts
Replicas         several engines, each in a process of its own
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any

from paged_infer.control.request import Request
from paged_infer.control.trace import Trace
from paged_infer.engine.kv_usage import Stats
from paged_infer.engine.output_channel import OutputChannel, deliver
from paged_infer.engine.request_states import StepReport, Unfinished
from paged_infer.execution.errors import EngineDeadError
from paged_infer.outputs import RequestOutput

if TYPE_CHECKING:
    from paged_infer.engine.engine import LLMEngine


class QueueFullError(RuntimeError):
    """The queue is full. The same request may be accepted later."""


class EngineClient(ABC):
    """Any method may be called from any thread.

    Args:
        max_num_waiting: the most sequences (samples or beams) that may be waiting, preempted ones included, when a
            request is added. None: no limit.

    Attributes:
        observers: see ``AsyncLLM.observers``.
        error: why it takes no more requests; None while it does.
        is_abandoned: whether ``abandon`` has ended it.
    """

    def __init__(self, max_num_waiting: int | None) -> None:
        self.observers: list[Callable[[StepReport], None]] = []
        self.error: EngineDeadError | None = None
        self.is_abandoned = False
        self._max_num_waiting = max_num_waiting

    @abstractmethod
    def add(self, request: Request, channel: OutputChannel, streamed: bool) -> None:
        """Queue a prepared request; its outputs come through ``channel``.

        Raises:
            QueueFullError: too many sequences are waiting.
            EngineDeadError: the engine has stopped.
        """

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """End the request, if it is unfinished; its reader gets the output so far, with finish_reason "abort"."""

    @abstractmethod
    def call(self, function: Callable[[LLMEngine], Any], replica: int = 0) -> Future[Any]:
        """Run ``function(engine)`` between two steps. ``replica``: of which engine, where there are several."""

    @abstractmethod
    def stop(self, finish: bool = False) -> None:
        """Accept no more requests; abort the unfinished ones, or, with ``finish``, let them finish. Does not wait."""

    @abstractmethod
    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the engine has ended or was abandoned, for ``timeout_s`` at most. Returns whether it has ended.

        Does not wait on a thread of its own, where garbage collection may call it.
        """

    @abstractmethod
    def abandon(self, reason: str) -> None:
        """Stop waiting for the current step. Unfinished requests end with an EngineDeadError."""

    @abstractmethod
    def replica_stats(self) -> list[Stats]:
        """See ``AsyncLLM.replica_stats``."""

    def health(self) -> list[dict[str, Any]]:
        """See ``AsyncLLM.health``."""
        return []

    @property
    def trace(self) -> Trace | None:
        """See ``AsyncLLM.trace``."""
        return None

    def check_alive(self) -> None:
        """Raises EngineDeadError if it takes no more requests."""
        if self.error is not None:
            raise self._dead()

    def _dead(self) -> EngineDeadError:
        """A new exception for each reader: one that is raised in many tasks collects all their tracebacks."""
        one = EngineDeadError(str(self.error))
        one.__cause__ = self.error.__cause__ if self.error else None
        return one

    def _shut_down(self) -> None:
        self.error = self.error or EngineDeadError("the engine has been shut down")

    def _check_accepts(self, num_waiting: int) -> None:
        """Raises what ``add`` raises, where so many sequences wait."""
        self.check_alive()
        if self._max_num_waiting is not None and num_waiting >= self._max_num_waiting:
            raise QueueFullError(
                f"{num_waiting} sequences are already waiting: max_num_waiting={self._max_num_waiting}"
            )

    def _fail(self, channels: Iterable[OutputChannel], answers: Iterable[Future[Any]] = ()) -> None:
        """The engine has ended: so do these requests and calls."""
        deliver([(channel, self._dead()) for channel in channels])
        for answer in answers:
            with contextlib.suppress(InvalidStateError):  # already answered, or cancelled
                answer.set_exception(self._dead())


class OneEngineClient(EngineClient):
    """The client of one engine: it keeps the channels of the unfinished requests.

    Attributes:
        gone: set when it delivers nothing more.
    """

    def __init__(self, max_num_waiting: int | None) -> None:
        super().__init__(max_num_waiting)
        self.gone = threading.Event()
        self._lock = threading.RLock()
        self._channels: Unfinished[OutputChannel] = Unfinished()  # guarded by _lock

    def _report(self, report: StepReport) -> None:
        """Give what a step has changed to observers, so that a request is counted first, and then to readers."""
        report.notify(self.observers)
        self._deliver([(output.request_id, output.finished, output) for output in report.outputs])

    def _deliver(self, items: list[tuple[str, bool, RequestOutput | Exception]]) -> None:
        """Each is the id of a request, whether it ends with that, and what its reader gets."""
        with self._lock:
            channels = [self._channels.oldest(request_id, is_over=is_over) for request_id, is_over, _ in items]
        found = zip(channels, items, strict=True)
        for loop in deliver((channel, item) for channel, (_, _, item) in found if channel is not None):
            with self._lock:  # it is closed, so its readers are gone
                left = [(request_id, channel) for request_id, channel in self._channels if channel.loop is loop]
                for _, channel in left:
                    channel.loop = None
            for request_id, _ in left:
                self.abort(request_id)
