"""The client of an engine in a process of its own. It has the interface of ``EngineThread``.

    this process                                                  the engine's process (engine_core)
    ------------                                                  ----------------------------------
    add / abort / call -> sender thread    -- [commands] -->      reader thread -> EngineThread
    OutputChannels     <- receiver thread  <-- one message a step --

Prompts are checked and tokenized in this process; tokens are decoded to text in the engine's. So the interpreter that
steps the engine does nothing else. If either process ends, for whatever reason, the other reads the end of the pipe:
the engine's process then exits, and the client ends every unfinished request with one EngineDeadError.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import replace
from multiprocessing import util
from typing import TYPE_CHECKING, Any, NamedTuple

from paged_infer.control.request import Request
from paged_infer.engine.engine_core import LAST_STEP_S
from paged_infer.engine.engine_thread import check_queue
from paged_infer.engine.output_channel import Delivery, OutputChannel, deliver
from paged_infer.engine.output_delta import OutputDecoder
from paged_infer.engine.process_messages import (
    Abort,
    Add,
    Answer,
    Call,
    Command,
    EngineInfo,
    EngineSpec,
    Failed,
    Message,
    Ready,
    Refused,
    Stats,
    Stepped,
    Stop,
    receive,
    send,
)
from paged_infer.engine.request_states import StepReport
from paged_infer.engine.routing import Load
from paged_infer.engine.spawned_process import StartedProcess, describe_exit, spawn
from paged_infer.engine.watchdog import Watchdog
from paged_infer.execution.errors import EngineDeadError
from paged_infer.outputs import RequestMetrics

if TYPE_CHECKING:
    from paged_infer.engine.engine import LLMEngine

logger = logging.getLogger(__name__)
SILENCE_S = 30.0  # after ``step_timeout_s``, in which the engine's own watchdog should have acted
REAP_S = 30.0  # from the end of the pipe to the end of the process


class _Entry(NamedTuple):
    request: Request
    channel: OutputChannel
    decoder: OutputDecoder


class EngineProcess:
    """Starts a process with one engine, and sends it requests.

    Args:
        spec: what to run.
        name: what messages about its end call it.
        max_num_waiting: the most sequences that may be waiting, as in ``EngineThread``; None: no limit.
        on_end: called once, from the receiver thread, when it has ended, for whatever reason.
        start: starts the process; by default on this machine.
    """

    def __init__(
        self,
        spec: EngineSpec,
        name: str = "the engine's process",
        max_num_waiting: int | None = None,
        on_end: Callable[[EngineProcess], None] = lambda _: None,
        start: Callable[[EngineSpec, str], StartedProcess] | None = None,
    ) -> None:
        self.name = name
        self.observers: list[Callable[[StepReport], None]] = []
        self.error: EngineDeadError | None = None
        self.is_abandoned = False
        self.gone = threading.Event()  # the process has ended, and its requests and calls with it
        self._max_num_waiting = max_num_waiting
        self._on_end = on_end
        self._lock = threading.Lock()  # guards the next five
        self._entries: dict[str, deque[_Entry]] = {}  # several for one id: an aborted request, then its successor
        self._sizes: deque[int] = deque()  # number of sequences of each request on the way
        self._num_submitted = 0
        self._calls: dict[int, Future[Any]] = {}
        self._num_calls = 0
        self._stats: Stats = {}
        self._started: Future[EngineInfo] = Future()
        self._is_loaded = False
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        timeout_s = None if spec.step_timeout_s is None else spec.step_timeout_s + SILENCE_S
        self.watchdog = Watchdog(timeout_s, lambda: self.abandon(f"it has been silent for {timeout_s} s"))
        self.process, self._connection, self._has_own_clock = (start or spawn)(spec, name)
        self._clock_offset_s = 0.0
        # At exit, multiprocessing waits for its children; these finalizers run before.
        self._at_exit = util.Finalize(None, self._end_at_exit, exitpriority=10)
        for target in (self._receive_all, self._send_all):
            threading.Thread(target=target, name=f"{name}, {target.__name__}", daemon=True).start()

    def wait_until_ready(self) -> EngineInfo:
        """Raises ValueError if the engine's constructor raised it, and EngineDeadError if the process ended."""
        return self._started.result()

    @property
    def is_ready(self) -> bool:
        """Whether it has loaded and accepts requests."""
        return self._is_loaded and self.error is None

    # -- from any thread --------------------------------------------------------------------------------------------

    def add(self, request: Request, channel: OutputChannel, streamed: bool) -> None:
        """See ``EngineThread.add``, errors included."""
        with self._lock:
            self._check_accepts()
            self._send(request, channel, streamed)

    def _check_accepts(self) -> None:
        """Raises EngineDeadError if the process has ended, and QueueFullError if too many sequences wait."""
        self.check_alive()
        if self._max_num_waiting is not None:
            check_queue(self._load().waiting, self._max_num_waiting)

    def _send(self, request: Request, channel: OutputChannel, streamed: bool) -> None:
        entry = _Entry(request, channel, OutputDecoder(request))
        self._entries.setdefault(request.request_id, deque()).append(entry)
        self._sizes.append(len(request.sequences))
        if len(self._entries) == 1:
            self.watchdog.begin()
        self._commands.put(Add(request, streamed))

    def abort(self, request_id: str) -> None:
        """See ``EngineThread.abort``."""
        with self._lock:
            if request_id in self._entries:
                self._commands.put(Abort(request_id))

    def call(self, function: Callable[[LLMEngine], Any]) -> Future[Any]:
        """Run ``function(engine)`` between two steps in the engine's process, and send its result back.

        Raises:
            ValueError: the function cannot be pickled: only a module-level one, or its ``functools.partial``, can be.
        """
        try:
            pickled = pickle.dumps(function)
        except Exception as error:  # pickle raises anything
            raise ValueError(f"{function!r} cannot be sent to {self.name}: {error}") from error
        answer: Future[Any] = Future()
        with self._lock:
            if self.gone.is_set():
                answer.set_exception(self._dead())
                return answer
            self._num_calls += 1
            self._calls[self._num_calls] = answer
            self._commands.put(Call(self._num_calls, pickled))
        return answer

    def stop(self, finish: bool = False) -> None:
        """See ``EngineThread.stop``. A process that has not finished loading is killed."""
        with self._lock:
            if self.error is None:
                self.error = EngineDeadError("the engine has been shut down")
        if self._is_loaded:
            self._commands.put(Stop(finish))
        else:
            self.process.kill()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the process has ended, for ``timeout_s`` at most. Returns whether it has, without being killed."""
        return self.gone.wait(timeout_s) and not self.is_abandoned

    def abandon(self, reason: str) -> None:
        """Kill the process. Unfinished requests end with an EngineDeadError."""
        with self._lock:
            if self.gone.is_set():
                return
            self.is_abandoned = True
            self.error = EngineDeadError(f"{self.name} has been killed: {reason}")
        logger.error("%s", self.error)
        self.process.kill()

    def check_alive(self) -> None:
        """Raises EngineDeadError if the process has ended, or is about to."""
        if self.error is not None:
            raise self._dead()

    def stats(self) -> Stats:
        """``LLMEngine.stats`` after the last step; sequences on the way to the engine count as waiting."""
        with self._lock:
            return {**self._stats, "num_waiting": self._load().waiting}

    def replica_stats(self) -> list[Stats]:
        """See ``AsyncLLM.replica_stats``."""
        return [self.stats()]

    @property
    def load(self) -> Load:
        with self._lock:
            return self._load()

    def _load(self) -> Load:
        waiting, running = self._stats.get("num_waiting", 0), self._stats.get("num_running", 0)
        return Load(int(waiting) + sum(self._sizes), int(running))

    # -- sender and receiver thread ---------------------------------------------------------------------------------

    def _send_all(self) -> None:
        """A thread of its own, because the pipe is full while the engine's process is stopped."""
        while (command := self._commands.get()) is not None:
            batch = [command]
            with contextlib.suppress(queue.Empty):
                while (command := self._commands.get_nowait()) is not None:
                    batch.append(command)
            try:
                send(self._connection, batch)
            except OSError:  # it has ended; the receiver thread sees it too
                return
            except Exception as error:  # pickle raises anything; without this thread, requests would wait forever
                return self.abandon(f"a command could not be sent: {error}")

    def _receive_all(self) -> None:
        try:
            while True:
                self._take(receive(self._connection))
        except (EOFError, OSError):
            pass
        except Exception:
            logger.exception("a message of %s could not be read", self.name)
            self.process.kill()
        self._end()

    def _take(self, message: Message) -> None:
        if isinstance(message, Stepped):
            self._report(message)
        elif isinstance(message, Failed):
            with self._lock:
                self._acknowledge(message.num_submitted)
                entry = self._oldest(message.request_id, is_over=True)
            if entry is not None:
                deliver([(entry.channel, message.error)])
        elif isinstance(message, Answer):
            with self._lock:
                answer = self._calls.pop(message.number)
            with contextlib.suppress(InvalidStateError):  # cancelled
                _set(answer, message)
        elif isinstance(message, Ready):
            self._stats, self._is_loaded = message.info.stats, True
            if self._has_own_clock:
                self._clock_offset_s = time.perf_counter() - message.clock_s
            self._started.set_result(message.info)
        elif isinstance(message, Refused):
            self._started.set_exception(ValueError(message.reason))
        elif message.error is not None:
            with self._lock:
                self.error = EngineDeadError(message.error)

    def _report(self, message: Stepped) -> None:
        offset_s = self._clock_offset_s
        report = StepReport(now=message.now + offset_s)
        deliveries: list[Delivery] = []
        with self._lock:
            self._stats = message.stats
            self._acknowledge(message.num_submitted)
            for request_id, index in message.grown:
                report.grown.append(self._entries[request_id][0].request.sequences[index])
            for delta in message.deltas:
                entry = self._oldest(delta.request_id, is_over=delta.finished)
                assert entry is not None, "an output of a request that has ended"
                if offset_s:
                    delta = delta._replace(metrics=_shifted(delta.metrics, offset_s))
                report.outputs.append(entry.decoder.decode(delta))
                deliveries.append((entry.channel, report.outputs[-1]))
            self.watchdog.begin() if self._entries else self.watchdog.pause()
        report.notify(self.observers)
        for loop in deliver(deliveries):  # closed: its readers are gone
            for request_id, entries in list(self._entries.items()):
                if entries[0].channel.loop is loop:
                    self.abort(request_id)

    def _oldest(self, request_id: str, is_over: bool) -> _Entry | None:
        entries = self._entries.get(request_id)
        if not entries:
            return None
        entry = entries.popleft() if is_over else entries[0]
        if not entries:
            del self._entries[request_id]
        return entry

    def _acknowledge(self, num_submitted: int) -> None:
        while self._num_submitted < num_submitted:
            self._num_submitted += 1
            self._sizes.popleft()

    def _end(self) -> None:
        """The pipe has ended: end every request and call, and refuse later ones."""
        self.watchdog.close()
        self.process.join(REAP_S)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        with self._lock:
            if self.error is None:
                self.error = EngineDeadError(f"{self.name} has ended: {describe_exit(self.process.exitcode)}")
            entries = [entry for of_id in self._entries.values() for entry in of_id]
            calls = list(self._calls.values())
            self._entries.clear()
            self._sizes.clear()
            self._calls.clear()
            self._stats = {**self._stats, "num_waiting": 0, "num_running": 0, "num_swapped": 0}
            self.gone.set()
        self._commands.put(None)
        self._connection.close()
        self._at_exit.cancel()
        if entries:
            failed = [entry.decoder.fail(str(self.error)) for entry in entries]
            StepReport(failed, now=time.perf_counter()).notify(self.observers)
        deliver([(entry.channel, self._dead()) for entry in entries])
        for call in calls:
            with contextlib.suppress(InvalidStateError):
                call.set_exception(self._dead())
        if not self._started.done():
            self._started.set_exception(self._dead())
        self._on_end(self)

    def _dead(self) -> EngineDeadError:
        """A new exception for each reader, as in ``EngineThread``."""
        return EngineDeadError(str(self.error))

    def _end_at_exit(self) -> None:
        self.stop()
        if not self.gone.wait(LAST_STEP_S):
            self.process.kill()


def _set(answer: Future[Any], message: Answer) -> None:
    if message.error is None:
        answer.set_result(message.value)
    else:
        answer.set_exception(message.error)


def _shifted(metrics: RequestMetrics, offset_s: float) -> RequestMetrics:
    """The times that the engine has recorded, on this process's clock."""

    def moved(time_s: float | None) -> float | None:
        return None if time_s is None else time_s + offset_s

    return replace(
        metrics,
        first_scheduled_time_s=moved(metrics.first_scheduled_time_s),
        first_token_time_s=moved(metrics.first_token_time_s),
        finished_time_s=moved(metrics.finished_time_s),
    )
