"""The processes of all ranks on this machine, and a thread that watches them.

    engine   control   commands and answers                                      rank
             pulse     <-- a heartbeat every second, or why the rank ends

Each is a pair of sockets that only these two processes hold, so that each notices when the other ends. The watcher ends
all ranks once one of them has ended, or has been silent or stopped for too long. A thread that waits for a rank then
reads the end of its socket, so nothing else here needs a timeout. Ranks end by themselves once the engine has ended.

Ranks are new interpreters that inherit two sockets and nothing else: a fork would copy locks that threads hold, and
CUDA's state, which cannot be copied. ``multiprocessing`` with "spawn" would import the caller's script again, which
would then need a guard. Each rank has a session of its own, so that a terminal's Ctrl-C reaches only the engine.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as ReadOnlyList
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from paged_infer.control.step import StepResult
from paged_infer.execution.errors import EngineDeadError, Failure, RankTraceback
from paged_infer.execution.step_delta import Delta
from paged_infer.execution.worker import BEAT_S, open_store
from paged_infer.model.parallel import Traffic

LOOPBACK = "127.0.0.1"
START_S = 300.0  # for a rank to import torch, before its first heartbeat
GRACE_S = 1.0  # for the other ranks to report once one has ended: the earliest failure is the cause
END_S = 2.0  # for a rank to end by itself
MODULE = "paged_infer.execution.worker"


class ProcessStep:
    """A step that the ranks compute; see ``RemoteStep``."""

    def __init__(self, index: int, ranks: RankProcesses) -> None:
        self._index, self._ranks = index, ranks

    def request(self) -> None:
        self._ranks.send(0, pickle.dumps(("result", (self._index,)), protocol=5))

    def wait(self) -> None:
        with contextlib.suppress(OSError):  # which ``result`` reports
            self._ranks.controls[0].poll(None)

    def result(self) -> StepResult:
        while True:
            index, result, self._ranks.traffic = self._ranks.answer(0)
            if index == self._index:  # else of an earlier request, whose wait was interrupted
                return result


class RankProcesses:
    """Starts ``size`` ranks; see ``Ranks``. ``close`` ends them, stopped ones (SIGSTOP) included.

    Args:
        timeout_s: the longest time between two heartbeats of a rank.
        environment: variables of the ranks, in addition to those of this process.
    """

    def __init__(self, size: int, timeout_s: float, environment: dict[str, str]) -> None:
        self.size, self.timeout_s = size, timeout_s
        self.is_loading = True
        self.traffic = Traffic()
        self._callbacks: list[Callable[[], None]] = []
        self._error: Exception | None = None
        self._traceback = ""
        self._ended = threading.Event()  # ``_error`` is set, and no rank is left
        self._is_closing = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pulses: list[Connection] = []
        self.controls: list[Connection] = []
        self._store: Any = open_store(LOOPBACK, timeout_s)  # its port is closed with the last reference
        self.store = (LOOPBACK, self._store.port)
        beat_s = min(BEAT_S, timeout_s / 5)
        try:
            for _ in range(size):
                self._start(beat_s, environment)
        except BaseException:
            self.close()
            raise
        self._watcher = threading.Thread(target=self._watch, args=(beat_s,), name="ranks", daemon=True)
        self._watcher.start()

    def _start(self, beat_s: float, environment: dict[str, str]) -> None:
        path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
        control, pulse = socket.socketpair(), socket.socketpair()
        with control[1], pulse[1]:
            self.controls.append(Connection(control[0].detach()))
            self._pulses.append(Connection(pulse[0].detach()))
            inherited = control[1].fileno(), pulse[1].fileno()
            self._processes.append(
                subprocess.Popen(
                    # -P: do not import from the working directory, where a file may be named like a library's module
                    [sys.executable, "-P", "-m", MODULE, *map(str, inherited), str(beat_s)],
                    pass_fds=inherited,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    env={**os.environ, **environment, "PYTHONPATH": path},
                )
            )

    @property
    def pids(self) -> list[int]:
        """See ``Ranks``."""
        return [process.pid for process in self._processes]

    def gpu_of(self, rank: int) -> int:
        """See ``Ranks``."""
        return rank

    def call(self, name: str, arguments: ReadOnlyList[tuple[Any, ...]]) -> list[Any]:
        """See ``Ranks``."""
        for rank, own in enumerate(arguments):
            self.send(rank, pickle.dumps((name, own), protocol=5))
        return [self.answer(rank) for rank in range(self.size)]

    def launch(self, index: int, delta: Delta) -> ProcessStep:
        """See ``Ranks``."""
        message = pickle.dumps(("launch", (delta,)), protocol=5)  # once for all
        for rank in range(self.size):
            self.send(rank, message)
        return ProcessStep(index, self)

    def send(self, rank: int, command: bytes) -> None:
        """A pickled command, to one rank. Raises what ``error`` returns."""
        try:
            self.controls[rank].send_bytes(command)
        except OSError:
            raise self.error() from self.cause

    def answer(self, rank: int) -> Any:
        """What a rank answers. Raises what ``error`` returns."""
        try:
            return self.controls[rank].recv()
        except (EOFError, OSError):
            raise self.error() from self.cause

    def check_alive(self) -> None:
        """See ``Ranks``."""
        if self._error is not None:
            raise self.error() from self.cause

    def on_death(self, callback: Callable[[], None]) -> None:
        """See ``Ranks``."""
        self._callbacks.append(callback)

    def error(self) -> Exception:
        """Why the ranks have ended, or are about to; a new exception for each caller."""
        self._ended.wait(START_S)
        if self._error is None:
            return EngineDeadError("the engine has been shut down")
        return type(self._error)(*self._error.args)

    @property
    def cause(self) -> RankTraceback | None:
        """The traceback in the rank that failed first."""
        return RankTraceback(self._traceback) if self._traceback else None

    def close(self) -> None:
        """End all ranks, and the calls that wait for them. May be called from any thread."""
        self._is_closing = True
        try:
            self._end(END_S)
        finally:
            self._ended.set()

    def _end(self, limit_s: float) -> None:
        """Close the ranks' sockets, at which they end; kill those that have not ended after ``limit_s``."""
        for connection in (*self.controls, *self._pulses):
            with contextlib.suppress(OSError):  # not close(): a thread that is reading would stay in its call
                socket.socket(fileno=os.dup(connection.fileno())).shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + limit_s
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._store = None

    # -- the watcher's thread ---------------------------------------------------------------------------------------

    def _watch(self, beat_s: float) -> None:
        pulses = {pulse: rank for rank, pulse in enumerate(self._pulses)}
        now = time.monotonic()
        silent_from = [now + START_S] * self.size  # when a rank's silence begins to count
        stopped_from = [math.inf] * self.size  # when it was first seen stopped, which counts while it starts, too
        failures: dict[int, Failure | None] = {}  # None: it ended without a report
        while not failures:
            before = time.monotonic()
            ready = wait(list(pulses), beat_s)
            now = time.monotonic()
            if now - before > 2 * beat_s + 1:  # this process was stopped; the ranks may have been, too
                silent_from = [max(one, now) for one in silent_from]
                stopped_from = [math.inf] * self.size
            for pulse in ready:
                assert isinstance(pulse, Connection)
                self._read(pulse, pulses[pulse], failures)
                silent_from[pulses[pulse]] = now
            for rank, process in enumerate(self._processes):
                stopped_from[rank] = min(stopped_from[rank], now) if is_stopped(process.pid) else math.inf
                if process.poll() is not None and not self._pulses[rank].poll():
                    failures.setdefault(rank, None)  # a process that it has started holds its socket open
            silent = [
                rank for rank in range(self.size) if now - min(silent_from[rank], stopped_from[rank]) > self.timeout_s
            ]
            if silent and not failures:
                return self._fail(self._silence(silent))
            if self._is_closing:
                return
        error = self._first_failure(pulses, failures)
        stopped = [rank for rank, since in enumerate(stopped_from) if since < math.inf and rank not in failures]
        if stopped:  # the others waited for it
            error = EngineDeadError(f"rank {self._shown(stopped)} is stopped by a signal; {error}")
        self._fail(error)

    def _read(self, pulse: Connection, rank: int, failures: dict[int, Failure | None]) -> None:
        try:
            report = pulse.recv()
        except (EOFError, OSError):
            failures.setdefault(rank, None)
        else:
            if report is not None:
                failures[rank] = report

    def _shown(self, ranks: ReadOnlyList[int]) -> str:
        return ", ".join(f"{rank} (process {self._processes[rank].pid})" for rank in ranks)

    def _silence(self, ranks: ReadOnlyList[int]) -> Exception:
        heard = f"no heartbeat for distributed_timeout={self.timeout_s:g} s"
        return EngineDeadError(f"rank {self._shown(ranks)} has sent {heard}")

    def _first_failure(self, pulses: dict[Connection, int], failures: dict[int, Failure | None]) -> Exception:
        """When one rank ends, the others fail, too. The cause is a signal, or else the earliest error."""
        deadline = time.monotonic() + GRACE_S
        while len(failures) < self.size and (left_s := deadline - time.monotonic()) > 0:
            for pulse in wait([pulse for pulse, rank in pulses.items() if rank not in failures], left_s):
                assert isinstance(pulse, Connection)
                self._read(pulse, pulses[pulse], failures)
        codes = {}
        for rank in (rank for rank, failure in failures.items() if failure is None):
            with contextlib.suppress(subprocess.TimeoutExpired):
                codes[rank] = self._processes[rank].wait(GRACE_S)
        killed = {rank: -code for rank, code in codes.items() if code < 0}
        when = " while it loaded: was memory short?" if self.is_loading else ""
        for rank, number in killed.items():
            name = signal.Signals(number).name
            return EngineDeadError(f"rank {rank} (process {self._processes[rank].pid}) was ended by {name}{when}")
        reports = {rank: failure for rank, failure in failures.items() if failure is not None}
        if not reports:
            rank, code = next(iter(codes.items()), (next(iter(failures)), None))
            return EngineDeadError(f"rank {rank} (process {self._processes[rank].pid}) has ended: exit status {code}")
        rank = min(reports, key=lambda one: reports[one].at_s)
        first = reports[rank]
        if not self.is_loading:
            first = replace(first, is_input=False)
        if not first.is_input:
            self._traceback = first.traceback
        return first.as_error(rank)

    def _fail(self, error: Exception) -> None:
        if not self._is_closing:
            self._error = error
        for process in self._processes:
            process.kill()
        self._end(END_S)
        self._ended.set()
        if not self._is_closing:
            for callback in list(self._callbacks):
                callback()


def is_stopped(pid: int) -> bool:
    """Whether a child is stopped, as by SIGSTOP. False where the system does not say so (macOS)."""
    if not hasattr(os, "waitid"):
        return False
    try:
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # it has ended
        return False
