"""The processes of all ranks on this machine, and a thread that watches them.

    engine   control   commands and answers                                      rank
             pulse     <-- a heartbeat every second, or why the rank ends

Each is a pair of sockets that only these two processes hold, so that each process notices when the other ends. The
watcher ends all ranks once one of them has ended, or has been silent for too long. A thread that waits for a rank then
reads the end of its socket, so nothing else here needs a timeout. Ranks end by themselves once the engine has ended.

Ranks are new interpreters that inherit two sockets and nothing else: a fork would copy locks that threads hold, and
CUDA's state, which cannot be copied. ``multiprocessing`` with "spawn" would import the caller's script again, which
would then need a guard. Each rank has a session of its own, so that a terminal's Ctrl-C reaches only the engine.
"""

from __future__ import annotations

import contextlib
import os
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

from paged_infer.execution.errors import EngineDeadError, Failure, RankTraceback
from paged_infer.execution.worker import BEAT_S

START_S = 300.0  # for a rank to import torch, before its first heartbeat
GRACE_S = 1.0  # for the other ranks to report once one has ended: the earliest failure is the cause
END_S = 2.0  # for a rank to end by itself
MODULE = "paged_infer.execution.worker"


class RankProcesses:
    """Starts ``size`` ranks. ``close`` ends them, stopped ones (SIGSTOP) included.

    Args:
        timeout_s: the longest time between two heartbeats of a rank.
        environment: variables of the ranks, in addition to those of this process.
    """

    def __init__(self, size: int, timeout_s: float, environment: dict[str, str]) -> None:
        self.size, self.timeout_s = size, timeout_s
        self.is_loading = True  # while they load, a ValueError is about the model or an option
        self.callbacks: list[Callable[[], None]] = []
        self._error: Exception | None = None
        self._traceback = ""
        self._ended = threading.Event()  # ``_error`` is set, and no rank is left
        self._is_closing = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pulses: list[Connection] = []
        self.controls: list[Connection] = []
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
        """By rank."""
        return [process.pid for process in self._processes]

    def send(self, name: str, arguments_of: Callable[[int], tuple[Any, ...]]) -> None:
        """Send a command to all ranks. Raises what ``error`` returns."""
        try:
            for rank, control in enumerate(self.controls):
                control.send((name, arguments_of(rank)))
        except OSError:
            raise self.error() from self.cause

    def send_bytes(self, message: bytes) -> None:
        """Send a pickled command to all ranks. Raises what ``error`` returns."""
        try:
            for control in self.controls:
                control.send_bytes(message)
        except OSError:
            raise self.error() from self.cause

    def answers(self) -> list[Any]:
        """The answers of all ranks. Raises what ``error`` returns."""
        return [self.answer(rank) for rank in range(self.size)]

    def answer(self, rank: int) -> Any:
        try:
            return self.controls[rank].recv()
        except (EOFError, OSError):
            raise self.error() from self.cause

    @property
    def has_failed(self) -> bool:
        return self._error is not None

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

    # -- the watcher's thread ---------------------------------------------------------------------------------------

    def _watch(self, beat_s: float) -> None:
        pulses = {pulse: rank for rank, pulse in enumerate(self._pulses)}
        now = time.monotonic()
        silent_from = [now + START_S] * self.size  # when a rank's silence begins to count
        failures: dict[int, Failure | None] = {}  # None: it ended without a report
        while not failures:
            before = time.monotonic()
            ready = wait(list(pulses), beat_s)
            now = time.monotonic()
            if now - before > 2 * beat_s + 1:  # this process was stopped; the ranks may have been, too
                silent_from = [max(one, now) for one in silent_from]
            for pulse in ready:
                assert isinstance(pulse, Connection)
                self._read(pulse, pulses[pulse], failures)
                silent_from[pulses[pulse]] = now
            silent = [rank for rank in range(self.size) if now - silent_from[rank] > self.timeout_s]
            if silent and not failures:
                return self._fail(self._silence(silent))
            if self._is_closing:
                return
        self._fail(self._first_failure(pulses, failures))

    def _read(self, pulse: Connection, rank: int, failures: dict[int, Failure | None]) -> None:
        try:
            report = pulse.recv()
        except (EOFError, OSError):
            failures.setdefault(rank, None)
        else:
            if report is not None:
                failures[rank] = report

    def _silence(self, ranks: ReadOnlyList[int]) -> Exception:
        shown = ", ".join(f"{rank} (process {self._processes[rank].pid})" for rank in ranks)
        return EngineDeadError(f"rank {shown} has sent no heartbeat for distributed_timeout={self.timeout_s:g} s")

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
            for callback in list(self.callbacks):
                callback()
