"""The thread that owns an LLMEngine: commands in, outputs out, asleep while there is no work.

    any thread                      this thread                              an event loop
    ----------                      -----------                              -------------
    add / abort / call  --inbox-->  [commands, one step, report] repeated  --one call a step-->  OutputChannel

Commands take effect between two steps, in order of arrival. After a step, all outputs for one event loop are delivered
by a single ``call_soon_threadsafe``, however many requests they belong to.

A step that does not return cannot be stopped, only abandoned (``abandon``): another thread ends every request with an
error, and the engine, whose step may still run, is not used again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from paged_infer.control.request import Request
from paged_infer.engine.engine import LLMEngine
from paged_infer.engine.output_channel import Delivery, OutputChannel, deliver
from paged_infer.engine.request_states import StepReport
from paged_infer.engine.watchdog import Watchdog
from paged_infer.execution.errors import EngineDeadError

logger = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """The queue is full. The same request may be accepted later."""


def check_queue(num_waiting: int, max_num_waiting: int) -> None:
    """Raises QueueFullError if so many sequences wait that no request may be added."""
    if num_waiting >= max_num_waiting:
        raise QueueFullError(f"{num_waiting} sequences are already waiting: max_num_waiting={max_num_waiting}")


@dataclass(slots=True)
class _Add:
    request: Request
    channel: OutputChannel
    streamed: bool


@dataclass(slots=True)
class _Abort:
    request_id: str


@dataclass(slots=True)
class _Call:
    function: Callable[[LLMEngine], Any]
    answer: Future[Any] = field(default_factory=Future)


class EngineThread:
    """Steps ``engine`` in a thread of its own while there is work, and sleeps otherwise.

    Args:
        engine: from now on only this thread may use it, except to ``prepare`` requests, one at a time.
        max_num_waiting: the most sequences (samples or beams) that may be waiting, preempted ones included, when a
            request is added.
        step_timeout_s: the longest that a step, with the commands before it, may take before it is abandoned. None: no
            limit.
    """

    def __init__(self, engine: LLMEngine, max_num_waiting: int, step_timeout_s: float | None = None) -> None:
        self.engine = engine
        self.observers: list[Callable[[StepReport], None]] = []
        self.error: EngineDeadError | None = None
        self.ended = threading.Event()
        self.is_abandoned = False
        self.has_failed = False
        self.num_submitted = 0  # requests that the thread has given to the engine
        self.gone = threading.Event()  # the thread has ended or was abandoned: it delivers nothing more
        self._max_num_waiting = max_num_waiting
        self._wake = threading.Condition()
        self._inbox: list[_Add | _Abort | _Call] = []  # guarded by _wake, as are _num_waiting and _stopping
        self._num_waiting = 0  # sequences waiting in the engine, as last counted, and those in the inbox
        self._taken: list[_Add | _Abort | _Call] = []  # taken from the inbox, perhaps not yet processed
        self._stopping = False
        self._has_lost_rank = False
        self._channels: dict[str, OutputChannel] = {}  # changed by the thread alone
        hung = f"a step has taken longer than step_timeout={step_timeout_s} s"
        self.watchdog = Watchdog(step_timeout_s, lambda: self.abandon(hung))
        engine.executor.on_death(self._notify)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- from any thread --------------------------------------------------------------------------------------------

    def replica_stats(self) -> list[dict[str, int | float]]:
        """See ``AsyncLLM.replica_stats``."""
        return [self.engine.stats()]

    def add(self, request: Request, channel: OutputChannel, streamed: bool) -> None:
        """Queue a prepared request; its outputs come through ``channel``.

        Raises:
            QueueFullError: too many sequences are waiting.
            EngineDeadError: the engine has stopped.
        """
        with self._wake:
            self.check_alive()
            check_queue(self._num_waiting, self._max_num_waiting)
            self._num_waiting += len(request.sequences)
            self._post(_Add(request, channel, streamed))

    def abort(self, request_id: str) -> None:
        """End the request, if it is unfinished; its reader gets the output so far, with finish_reason "abort"."""
        with self._wake:
            if not self.gone.is_set():
                self._post(_Abort(request_id))

    def call(self, function: Callable[[LLMEngine], Any]) -> Future[Any]:
        """Run ``function(engine)`` between two steps, or in the caller's thread if this one has ended.

        If the thread was abandoned, the future raises an EngineDeadError.
        """
        command = _Call(function)
        with self._wake:
            if not self.gone.is_set():
                self._post(command)
                return command.answer
        if self.is_abandoned:
            command.answer.set_exception(self._dead())
        else:
            self._answer(command)
        return command.answer

    def stop(self, finish: bool = False) -> None:
        """Accept no more requests; abort the unfinished ones, or, with ``finish``, let them finish. Does not wait."""
        with self._wake:
            if self.error is None:
                self.error = EngineDeadError("the engine has been shut down")
            if not finish:
                self._stopping = True
            self._wake.notify()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the thread has ended or was abandoned, for ``timeout_s`` at most. Returns whether it has ended."""
        if self.gone.wait(timeout_s) and not self.is_abandoned:
            self._thread.join()
        return self.ended.is_set()

    def abandon(self, reason: str) -> None:
        """Stop waiting for the current step. Unfinished requests end with an EngineDeadError."""
        with self._wake:
            if self.gone.is_set():
                return
            self.is_abandoned = True
            self.error = EngineDeadError(f"the engine has been abandoned: {reason}")
            commands, self._inbox = [*self._taken, *self._inbox], []
            self.gone.set()
        logger.error("%s", self.error)
        self.engine.shutdown()
        channels = {*self._channels.values(), *(c.channel for c in commands if isinstance(c, _Add))}
        self._deliver([(channel, self._dead()) for channel in channels])
        for command in commands:
            if isinstance(command, _Call):
                with contextlib.suppress(InvalidStateError):  # already answered
                    command.answer.set_exception(self._dead())

    def check_alive(self) -> None:
        """Raises EngineDeadError if the engine has failed, was stopped or was abandoned."""
        if self.error is not None:
            raise EngineDeadError(str(self.error)) from self.error.__cause__

    def _notify(self) -> None:
        """Another process of the engine has ended, perhaps while this thread is asleep."""
        with self._wake:
            self._has_lost_rank = True
            self._wake.notify()

    def _post(self, command: _Add | _Abort | _Call) -> None:
        self._inbox.append(command)
        self._wake.notify()

    # -- on the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._process_commands():
                if self.engine.has_unfinished_requests:
                    report = self.engine.step(self._sleep)
                    self._recount()
                    if not self.is_abandoned:
                        self._report(report)
        except BaseException as error:
            logger.exception("the engine has failed")
            reason = str(error) if isinstance(error, EngineDeadError) else f"{type(error).__name__}: {error}"
            died = EngineDeadError(f"the engine has failed: {reason}")
            died.__cause__ = error
            self._fail_all(died)
        else:
            self._fail_all(None)

    def _sleep(self, seconds: float) -> None:
        """Wait while the policy lets a batch fill; a new command ends the wait."""
        self.watchdog.pause()
        with self._wake:
            if not self._inbox and not self._stopping:
                self._wake.wait(seconds)
        self.watchdog.begin()

    def _process_commands(self) -> bool:
        """Wait for work, and process the commands in the inbox. Returns False when the thread is to end."""
        self.watchdog.pause()
        with self._wake:
            while not (self._inbox or self.engine.has_unfinished_requests or self.error or self._has_lost_rank):
                self._wake.wait()
            if self.is_abandoned:
                return False
            if self._has_lost_rank:
                self.engine.check_alive()
            self._taken, self._inbox = self._inbox, []
        self.watchdog.begin()
        for command in self._taken:
            if isinstance(command, _Add):
                self._submit(command)
            elif isinstance(command, _Abort):
                self._abort(command.request_id)
            else:
                self._answer(command)
        self._taken = []
        if self._stopping:
            for request_id in list(self._channels):
                self._abort(request_id)
        self._recount()
        return self.error is None or self.engine.has_unfinished_requests

    def _recount(self) -> None:
        with self._wake:
            added = [command.request for command in self._inbox if isinstance(command, _Add)]
            coming = sum(len(request.sequences) for request in added)
            self._num_waiting = len(self.engine.scheduler.waiting) + coming

    def _submit(self, command: _Add) -> None:
        request_id, channel = command.request.request_id, command.channel
        self.num_submitted += 1
        try:
            self.engine.submit(command.request, streamed=command.streamed)
        except ValueError as error:
            self._deliver([(channel, error)])
        else:
            self._channels[request_id] = channel

    def _abort(self, request_id: str) -> None:
        output = self.engine.abort(request_id)
        if output is not None:
            self._report(StepReport([output], now=time.perf_counter()))

    def _answer(self, command: _Call) -> None:
        if not command.answer.set_running_or_notify_cancel():  # cancelled by its caller
            return
        try:
            result = command.function(self.engine)
        except Exception as error:
            with contextlib.suppress(InvalidStateError):  # answered by abandon()
                command.answer.set_exception(error)
        else:
            with contextlib.suppress(InvalidStateError):
                command.answer.set_result(result)

    def _report(self, report: StepReport) -> None:
        deliveries: list[Delivery] = []
        for output in report.outputs:
            get = self._channels.pop if output.finished else self._channels.__getitem__
            deliveries.append((get(output.request_id), output))
        report.notify(self.observers)
        self._deliver(deliveries)  # last: a request's metrics are counted before its reader gets the output

    def _deliver(self, deliveries: list[Delivery]) -> None:
        for loop in deliver(deliveries):  # it is closed, so its readers are gone: abort their requests
            if self.is_abandoned:
                continue
            for request_id in [i for i, channel in self._channels.items() if channel.loop is loop]:
                del self._channels[request_id]
                self.engine.abort(request_id)

    def _fail_all(self, died: EngineDeadError | None) -> None:
        """End every request and command, those still in the inbox included; later ones are refused."""
        self.watchdog.close()
        with self._wake:
            self.has_failed = died is not None
            self.error = died or self.error  # from here on no request is added
        for request_id in self._channels:
            try:
                self.engine.abort(request_id)
            except Exception:
                logger.exception("request %s could not be aborted", request_id)
        with self._wake:
            commands, self._inbox = self._inbox, []
            self.ended.set()
            self.gone.set()
        self.engine.shutdown()
        if self.is_abandoned:  # abandon() has already ended every request
            return
        orphaned = [*self._channels.values(), *(c.channel for c in commands if isinstance(c, _Add))]
        self._channels.clear()
        self._deliver([(channel, self._dead()) for channel in orphaned])
        for command in commands:
            if isinstance(command, _Call):
                self._answer(command)

    def _dead(self) -> EngineDeadError:
        """A new exception for each reader: one that is raised in many tasks collects all their tracebacks."""
        one = EngineDeadError(str(self.error))
        one.__cause__ = self.error.__cause__ if self.error else None
        return one
