"""The client of an engine in a process of its own.

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
from multiprocessing import util
from typing import TYPE_CHECKING, Any

from paged_infer.control.request import Request
from paged_infer.engine import process_messages as messages
from paged_infer.engine.engine_client import OneEngineClient
from paged_infer.engine.engine_core import LAST_STEP_S
from paged_infer.engine.kv_usage import Stats
from paged_infer.engine.output_channel import OutputChannel
from paged_infer.engine.output_delta import OutputDecoder
from paged_infer.engine.process_messages import EngineInfo, EngineSpec
from paged_infer.engine.request_states import StepReport
from paged_infer.engine.routing import Load
from paged_infer.engine.spawned_process import StartedProcess, describe_exit, spawn
from paged_infer.engine.watchdog import Watchdog
from paged_infer.execution.errors import EngineDeadError

if TYPE_CHECKING:
    from paged_infer.engine.engine import LLMEngine

logger = logging.getLogger(__name__)
SILENCE_S = 30.0  # after ``step_timeout_s``, in which the engine's own watchdog should have acted
REAP_S = 30.0  # from the end of the pipe to the end of the process


class EngineProcess(OneEngineClient):
    """Starts a process with one engine, and sends it requests.

    Args:
        spec: what to run.
        name: what messages about its end call it.
        max_num_waiting: see ``EngineClient``.
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
        super().__init__(max_num_waiting)
        self.name = name
        self._on_end = on_end
        self._outputs = OutputDecoder()  # guarded by _lock, as are the next five
        self._stats: Stats = {}  # after the engine's last step
        self._sizes: deque[int] = deque()  # number of sequences of each request on the way to the engine
        self._num_submitted = 0  # requests that it has got
        self._calls: dict[int, Future[Any]] = {}
        self._num_calls = 0
        self._started: Future[EngineInfo] = Future()
        self._is_loaded = False
        self._commands: queue.SimpleQueue[messages.Command | None] = queue.SimpleQueue()
        timeout_s = None if spec.step_timeout_s is None else spec.step_timeout_s + SILENCE_S
        self.watchdog = Watchdog(timeout_s, lambda: self.abandon(f"it has been silent for {timeout_s} s"))
        self.process, self._connection, self._has_own_clock = (start or spawn)(spec, name)
        # At exit, multiprocessing waits for its children; these finalizers run before.
        self._at_exit = util.Finalize(None, self._end_at_exit, exitpriority=10)
        self._threads = [
            threading.Thread(target=target, name=f"{name}, {target.__name__}", daemon=True)
            for target in (self._receive_all, self._send_all)
        ]
        for thread in self._threads:
            thread.start()

    def wait_until_ready(self) -> EngineInfo:
        """Raises ValueError if the engine's constructor raised it, and EngineDeadError if the process ended."""
        return self._started.result()

    @property
    def is_ready(self) -> bool:
        """Whether it has loaded and accepts requests."""
        return self._is_loaded and self.error is None

    # -- from any thread --------------------------------------------------------------------------------------------

    def add(self, request: Request, channel: OutputChannel, streamed: bool) -> None:
        with self._lock:
            self._check_accepts(self.load.waiting)
            self._send(request, channel, streamed)

    def _send(self, request: Request, channel: OutputChannel, streamed: bool) -> None:
        if not self._outputs:
            self.watchdog.begin()
        self._channels.add(request.request_id, channel)
        self._outputs.add(request)
        self._sizes.append(len(request.sequences))
        self._commands.put(messages.Add(request, streamed))

    def abort(self, request_id: str) -> None:
        with self._lock:
            if request_id in self._channels:
                self._commands.put(messages.Abort(request_id))

    def call(self, function: Callable[[LLMEngine], Any], replica: int = 0) -> Future[Any]:
        """See ``EngineClient.call``. It runs in the engine's process, and its result is sent back.

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
            self._commands.put(messages.Call(self._num_calls, pickled))
        return answer

    def stop(self, finish: bool = False) -> None:
        """See ``EngineClient.stop``. A process that has not finished loading is killed."""
        with self._lock:
            self._shut_down()
        if self._is_loaded:
            self._commands.put(messages.Stop(finish))
        else:
            self.process.kill()

    def join(self, timeout_s: float | None = None) -> bool:
        if threading.current_thread() in self._threads:
            return False
        return self.gone.wait(timeout_s) and not self.is_abandoned

    def abandon(self, reason: str) -> None:
        """See ``EngineClient.abandon``. The process is killed."""
        with self._lock:
            if self.gone.is_set():
                return
            self.is_abandoned = True
            self.error = EngineDeadError(f"{self.name} has been killed: {reason}")
        logger.error("%s", self.error)
        self.process.kill()

    def stats(self) -> Stats:
        """``LLMEngine.stats`` after the last step; sequences on the way to the engine count as waiting."""
        with self._lock:
            return {**self._stats, "num_waiting": self.load.waiting}

    def replica_stats(self) -> list[Stats]:
        return [self.stats()]

    @property
    def load(self) -> Load:
        with self._lock:
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
                messages.send(self._connection, batch)
            except OSError:  # it has ended; the receiver thread sees it too
                return
            except Exception as error:  # pickle raises anything; without this thread, requests would wait forever
                return self.abandon(f"a command could not be sent: {error}")

    def _receive_all(self) -> None:
        try:
            while True:
                self._take(messages.receive(self._connection))
        except (EOFError, OSError):
            pass
        except Exception:
            logger.exception("a message of %s could not be read", self.name)
            self.process.kill()
        self._end()

    def _take(self, message: messages.Message) -> None:
        if isinstance(message, messages.Stepped):
            self._report(self._settled(message))
        elif isinstance(message, messages.Failed):
            with self._lock:
                self._acknowledge(message.num_submitted)
                self._outputs.drop(message.request_id)
                self._set_watchdog()
            self._deliver([(message.request_id, True, message.error)])
        elif isinstance(message, messages.Answer):
            with self._lock:
                answer = self._calls.pop(message.number)
            with contextlib.suppress(InvalidStateError):  # cancelled
                answer.set_result(message.value) if message.error is None else answer.set_exception(message.error)
        elif isinstance(message, messages.Ready):
            self._stats, self._is_loaded = message.info.stats, True
            if self._has_own_clock:
                self._outputs.clock_offset_s = time.perf_counter() - message.clock_s
            self._started.set_result(message.info)
        elif isinstance(message, messages.Refused):
            self._started.set_exception(ValueError(message.reason))
        elif message.error is not None:
            with self._lock:
                self.error = EngineDeadError(message.error)

    def _settled(self, message: messages.Stepped) -> StepReport:
        """The engine's own report of the step, with outputs that are built here."""
        with self._lock:
            self._stats = message.stats
            self._acknowledge(message.num_submitted)
            grown = [self._outputs.sequence(request_id, index) for request_id, index in message.grown]
            outputs = [self._outputs.decode(delta) for delta in message.deltas]
            self._set_watchdog()
        return StepReport(outputs, grown, message.now + self._outputs.clock_offset_s)

    def _acknowledge(self, num_submitted: int) -> None:
        while self._num_submitted < num_submitted:
            self._num_submitted += 1
            self._sizes.popleft()

    def _set_watchdog(self) -> None:
        self.watchdog.begin() if self._outputs else self.watchdog.pause()

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
            outputs, channels = self._outputs.fail(str(self.error)), self._channels.clear()
            self._sizes.clear()
            self._stats = {**self._stats, "num_waiting": 0, "num_running": 0, "num_swapped": 0}
            calls = list(self._calls.values())
            self._calls.clear()
            self.gone.set()
        self._commands.put(None)
        self._connection.close()
        self._at_exit.cancel()
        if outputs:
            StepReport(outputs, now=time.perf_counter()).notify(self.observers)
        self._fail(channels, [*calls, self._started])
        self._on_end(self)

    def _end_at_exit(self) -> None:
        self.stop()
        if not self.gone.wait(LAST_STEP_S):
            self.process.kill()
