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
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import Any, NamedTuple

from paged_infer.control.request import Request
from paged_infer.control.trace import Trace
from paged_infer.engine.engine import LLMEngine
from paged_infer.engine.engine_client import OneEngineClient
from paged_infer.engine.kv_usage import Stats
from paged_infer.engine.output_channel import OutputChannel
from paged_infer.engine.request_states import StepReport
from paged_infer.engine.watchdog import Watchdog
from paged_infer.execution.errors import EngineDeadError

logger = logging.getLogger(__name__)


class _Command(NamedTuple):
    run: Callable[[], None]
    num_sequences: int = 0  # that it adds


class EngineThread(OneEngineClient):
    """Steps ``engine`` in a thread of its own while there is work, and sleeps otherwise.

    Args:
        engine: from now on only this thread may use it, except to ``prepare`` requests, one at a time.
        max_num_waiting: see ``EngineClient``.
        step_timeout_s: the longest that a step, with the commands before it, may take before it is abandoned. None: no
            limit.
    """

    def __init__(self, engine: LLMEngine, max_num_waiting: int, step_timeout_s: float | None = None) -> None:
        super().__init__(max_num_waiting)
        self.engine = engine
        self.ended = threading.Event()
        self.has_failed = False
        self.num_submitted = 0  # requests that the thread has given to the engine
        self._wake = threading.Condition(self._lock)  # guards the next five
        self._inbox: deque[_Command] = deque()  # taken by the thread alone
        self._num_waiting = 0  # sequences waiting in the engine, as last counted, and those in the inbox
        self._answers: set[Future[Any]] = set()  # to calls
        self._stopping = False
        self._has_lost_rank = False
        hung = f"a step has taken longer than step_timeout={step_timeout_s} s"
        self.watchdog = Watchdog(step_timeout_s, lambda: self.abandon(hung))
        engine.executor.on_death(self._notify)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- from any thread --------------------------------------------------------------------------------------------

    def add(self, request: Request, channel: OutputChannel, streamed: bool) -> None:
        with self._wake:
            self._check_accepts(self._num_waiting)
            self._num_waiting += len(request.sequences)
            self._channels.add(request.request_id, channel)
            self._post(_Command(partial(self._submit, request, streamed), len(request.sequences)))

    def abort(self, request_id: str) -> None:
        with self._wake:
            if not self.gone.is_set():
                self._post(_Command(partial(self._abort, request_id)))

    def call(self, function: Callable[[LLMEngine], Any], replica: int = 0) -> Future[Any]:
        """See ``EngineClient.call``. In the caller's own thread once this one has ended.

        If the thread was abandoned, the future raises an EngineDeadError.
        """
        answer: Future[Any] = Future()
        with self._wake:
            if not self.gone.is_set():
                self._answers.add(answer)
                answer.add_done_callback(self._answers.discard)
                self._post(_Command(partial(self._answer, function, answer)))
                return answer
        if self.is_abandoned:
            answer.set_exception(self._dead())
        else:
            self._answer(function, answer)
        return answer

    def stop(self, finish: bool = False) -> None:
        with self._wake:
            self._shut_down()
            self._stopping |= not finish
            self._wake.notify()

    def join(self, timeout_s: float | None = None) -> bool:
        if threading.current_thread() is not self._thread and self.gone.wait(timeout_s) and not self.is_abandoned:
            self._thread.join()
        return self.ended.is_set()

    def abandon(self, reason: str) -> None:
        with self._wake:
            if self.gone.is_set():
                return
            self.is_abandoned = True
            self.error = EngineDeadError(f"the engine has been abandoned: {reason}")
            channels, answers = self._channels.clear(), list(self._answers)
            self.gone.set()
        logger.error("%s", self.error)
        self.engine.shutdown()
        self._fail(channels, answers)

    def replica_stats(self) -> list[Stats]:
        return [self.engine.stats()]

    @property
    def trace(self) -> Trace | None:
        return self.engine.scheduler.trace

    def _notify(self) -> None:
        """Another process of the engine has ended, perhaps while this thread is asleep."""
        with self._wake:
            self._has_lost_rank = True
            self._wake.notify()

    def _post(self, command: _Command) -> None:
        self._inbox.append(command)
        self._wake.notify()

    # -- on the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        died: EngineDeadError | None = None
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
        self._end(died)

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
            num_commands = len(self._inbox)  # more may come meanwhile: they wait for the next step
        self.watchdog.begin()
        for _ in range(num_commands):
            self._inbox.popleft().run()
        if self._stopping:
            for request_id in list(self.engine.requests.by_id):
                self._abort(request_id)
        self._recount()
        return self.error is None or self.engine.has_unfinished_requests

    def _recount(self) -> None:
        with self._wake:
            coming = sum(command.num_sequences for command in self._inbox)
            self._num_waiting = len(self.engine.scheduler.waiting) + coming

    def _submit(self, request: Request, streamed: bool) -> None:
        if self.gone.is_set():  # its reader has been given the error
            return
        self.num_submitted += 1
        try:
            self.engine.submit(request, streamed=streamed)
        except ValueError as error:
            self._deliver([(request.request_id, True, error)])

    def _abort(self, request_id: str) -> None:
        output = self.engine.abort(request_id)
        if output is not None:
            self._report(StepReport([output], now=time.perf_counter()))

    def _answer(self, function: Callable[[LLMEngine], Any], answer: Future[Any]) -> None:
        with contextlib.suppress(InvalidStateError):  # answered by abandon()
            if not answer.set_running_or_notify_cancel():  # cancelled by its caller
                return
            try:
                result = function(self.engine)
            except Exception as error:
                answer.set_exception(error)
            else:
                answer.set_result(result)

    def _end(self, died: EngineDeadError | None) -> None:
        """End every request and command, those still in the inbox included; later ones are refused."""
        self.watchdog.close()
        with self._wake:
            self.has_failed = died is not None
            self.error = died or self.error  # from here on no request is added
        for request_id in list(self.engine.requests.by_id):
            try:
                self.engine.abort(request_id)
            except Exception:
                logger.exception("request %s could not be aborted", request_id)
        with self._wake:
            channels = self._channels.clear()
            self.ended.set()
            self.gone.set()
        self.engine.shutdown()
        if self.is_abandoned:  # abandon() has already ended every request
            return
        self._fail(channels)
        for command in self._inbox:  # calls among them are answered
            command.run()
