"""The thread that owns an LLMEngine: commands in, outputs out, asleep when there is nothing to do.

    any thread                      this thread                              an event loop
    ----------                      -----------                              -------------
    add / abort / call  --inbox-->  [commands, one step, report] repeated  --one call a step-->  Mailbox --> its reader

Commands take effect between two steps, in the order in which they were given. After a step, all that it has to tell
one event loop crosses over in a single ``call_soon_threadsafe``, however many requests it moved.

A step that does not return cannot be stopped, only abandoned (``abandon``): another thread ends every request with an
error, and the engine, whose step may still run, is not used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from paged_infer.control.request import Request
from paged_infer.engine.engine import LLMEngine, StepReport
from paged_infer.engine.watchdog import Watchdog
from paged_infer.outputs import RequestOutput

logger = logging.getLogger(__name__)


class EngineDeadError(RuntimeError):
    """The engine serves no more: a step of it has failed (``__cause__`` says how), or it has been shut down."""


class QueueFullError(RuntimeError):
    """As many requests wait as may wait. The same request may be welcome a moment later."""


@dataclass(slots=True, eq=False)
class Mailbox:
    """Where the newest output of one request lies until it is read. Lives in its reader's event loop.

    Outputs are cumulative, so a newer one takes the place of one that nobody has read: a slow reader costs no memory.
    """

    loop: asyncio.AbstractEventLoop
    newest: RequestOutput | Exception | None = None
    _reader: asyncio.Future[None] | None = None

    def put(self, item: RequestOutput | Exception) -> None:
        self.newest = item
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> RequestOutput:
        """The newest output, once there is one; raises what came in its place."""
        if self.newest is None:
            self._reader = self.loop.create_future()
            await self._reader
        item, self.newest, self._reader = self.newest, None, None
        assert item is not None
        if isinstance(item, Exception):
            raise item
        return item


@dataclass(slots=True)
class _Add:
    request: Request
    mailbox: Mailbox
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
        engine: nobody else may touch it from now on, except to ``prepare`` requests, one at a time.
        max_num_waiting: most sequences (samples or beams) that may wait, those preempted included, when one more
            request is added.
        step_timeout_s: the longest that a step, with the commands before it, may take; then it is abandoned. None: no
            limit.
    """

    def __init__(self, engine: LLMEngine, max_num_waiting: int, step_timeout_s: float | None = None) -> None:
        self.engine = engine
        self.observers: list[Callable[[StepReport], None]] = []
        self.error: EngineDeadError | None = None
        self.ended = threading.Event()
        self.is_abandoned = False
        self.gone = threading.Event()  # the thread has ended or was abandoned: it delivers nothing more
        self._max_num_waiting = max_num_waiting
        self._wake = threading.Condition()
        self._inbox: list[_Add | _Abort | _Call] = []  # guarded by _wake, as are _num_waiting and _stopping
        self._num_waiting = 0  # sequences in the engine, as they stood when it last did something, and in the inbox
        self._taken: list[_Add | _Abort | _Call] = []  # taken from the inbox, perhaps not yet carried out
        self._stopping = False
        self._mailboxes: dict[str, Mailbox] = {}  # changed by the thread alone
        hung = f"a step has taken longer than step_timeout={step_timeout_s} s"
        self.watchdog = Watchdog(step_timeout_s, lambda: self.abandon(hung))
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- from any thread --------------------------------------------------------------------------------------------

    def add(self, request: Request, mailbox: Mailbox, streamed: bool) -> None:
        """Queue a prepared request; what becomes of it comes into ``mailbox``.

        Raises:
            QueueFullError: too many wait.
            EngineDeadError: nobody will serve it.
        """
        with self._wake:
            self.check_alive()
            if self._num_waiting >= self._max_num_waiting:
                raise QueueFullError(
                    f"{self._num_waiting} sequences wait already: max_num_waiting={self._max_num_waiting}"
                )
            self._num_waiting += len(request.sequences)
            self._post(_Add(request, mailbox, streamed))

    def abort(self, request_id: str) -> None:
        """End the request, if it is still served; its mailbox gets what there is, with finish_reason "abort"."""
        with self._wake:
            if not self.gone.is_set():
                self._post(_Abort(request_id))

    def call(self, function: Callable[[LLMEngine], Any]) -> Future[Any]:
        """Run ``function(engine)`` between two steps; when the thread has ended, in the caller's own.

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
        """Add no more; end when what runs has finished, or else abort it and end at once. Does not wait."""
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
        """From any thread: stop waiting for the step under way. Unfinished requests end with an EngineDeadError."""
        with self._wake:
            if self.gone.is_set():
                return
            self.is_abandoned = True
            self.error = EngineDeadError(f"the engine has been abandoned: {reason}")
            commands, self._inbox = [*self._taken, *self._inbox], []
            self.gone.set()
        logger.error("%s", self.error)
        mailboxes = {*self._mailboxes.values(), *(c.mailbox for c in commands if isinstance(c, _Add))}
        self._deliver([(mailbox, self._dead()) for mailbox in mailboxes])
        for command in commands:
            if isinstance(command, _Call):
                with contextlib.suppress(InvalidStateError):  # already answered
                    command.answer.set_exception(self._dead())

    def check_alive(self) -> None:
        """Raises EngineDeadError if the engine has failed, was stopped or was abandoned."""
        if self.error is not None:
            raise EngineDeadError(str(self.error)) from self.error.__cause__

    def _post(self, command: _Add | _Abort | _Call) -> None:
        self._inbox.append(command)
        self._wake.notify()

    # -- on the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._obey():
                if self.engine.has_unfinished_requests:
                    report = self.engine.step(self._sleep)
                    self._recount()
                    if not self.is_abandoned:
                        self._report(report)
        except BaseException as error:
            logger.exception("the engine has failed")
            died = EngineDeadError(f"the engine has failed: {type(error).__name__}: {error}")
            died.__cause__ = error
            self._die(died)
        else:
            self._die(None)

    def _sleep(self, seconds: float) -> None:
        """While the policy waits for a batch to fill: whoever comes ends the nap."""
        self.watchdog.pause()
        with self._wake:
            if not self._inbox and not self._stopping:
                self._wake.wait(seconds)
        self.watchdog.begin()

    def _obey(self) -> bool:
        """Wait for work, and carry out the commands that have come. False when it is time to end."""
        self.watchdog.pause()
        with self._wake:
            while not (self._inbox or self.engine.has_unfinished_requests or self.error):
                self._wake.wait()
            if self.is_abandoned:
                return False
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
            for request_id in list(self._mailboxes):
                self._abort(request_id)
        self._recount()
        return self.error is None or self.engine.has_unfinished_requests

    def _recount(self) -> None:
        with self._wake:
            added = [command.request for command in self._inbox if isinstance(command, _Add)]
            coming = sum(len(request.sequences) for request in added)
            self._num_waiting = len(self.engine.scheduler.waiting) + coming

    def _submit(self, command: _Add) -> None:
        request_id, mailbox = command.request.request_id, command.mailbox
        try:
            self.engine.submit(command.request, streamed=command.streamed)
        except ValueError as error:
            self._deliver([(mailbox, error)])
        else:
            self._mailboxes[request_id] = mailbox

    def _abort(self, request_id: str) -> None:
        output = self.engine.abort(request_id)
        if output is not None:
            self._report(StepReport([output], now=time.perf_counter()))

    def _answer(self, command: _Call) -> None:
        if not command.answer.set_running_or_notify_cancel():  # whoever asked has gone
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
        letters: list[tuple[Mailbox, RequestOutput | Exception]] = []
        for output in report.outputs:
            get = self._mailboxes.pop if output.finished else self._mailboxes.__getitem__
            letters.append((get(output.request_id), output))
        for observer in list(self.observers):
            try:
                observer(report)
            except Exception:  # who only looks on must not cost anybody an answer
                logger.exception("an observer has failed and is told no more")
                self.observers.remove(observer)
        self._deliver(letters)  # last, so that whoever holds an answer finds it counted

    def _deliver(self, letters: list[tuple[Mailbox, RequestOutput | Exception]]) -> None:
        """One call for each event loop that has a reader among them: usually one."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, RequestOutput | Exception]]] = {}
        for letter in letters:
            by_loop.setdefault(letter[0].loop, []).append(letter)
        for loop, bundle in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, bundle)
            except RuntimeError:  # the loop is closed: its readers are gone, and what they asked for with them
                if self.is_abandoned:
                    continue
                for request_id in [i for i, mailbox in self._mailboxes.items() if mailbox.loop is loop]:
                    del self._mailboxes[request_id]
                    self.engine.abort(request_id)

    def _die(self, died: EngineDeadError | None) -> None:
        """Leave nobody waiting: not who is served, not who has just come, not who asks from now on."""
        self.watchdog.close()
        with self._wake:
            self.error = died or self.error  # from here on nobody is added
        for request_id in self._mailboxes:
            try:
                self.engine.abort(request_id)
            except Exception:
                logger.exception("request %s could not be aborted", request_id)
        with self._wake:
            commands, self._inbox = self._inbox, []
            self.ended.set()
            self.gone.set()
        if self.is_abandoned:  # abandon() has already ended every request
            return
        orphans = [*self._mailboxes.values(), *(c.mailbox for c in commands if isinstance(c, _Add))]
        self._mailboxes.clear()
        self._deliver([(mailbox, self._dead()) for mailbox in orphans])
        for command in commands:
            if isinstance(command, _Call):
                self._answer(command)

    def _dead(self) -> EngineDeadError:
        """An exception of its own for everybody who is told: one raised in many tasks would grow their tracebacks."""
        one = EngineDeadError(str(self.error))
        one.__cause__ = self.error.__cause__ if self.error else None
        return one


def _put_all(letters: list[tuple[Mailbox, RequestOutput | Exception]]) -> None:
    for mailbox, item in letters:
        mailbox.put(item)
