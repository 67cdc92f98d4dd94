"""The process of an engine as its client sees it, and how it is started on this machine."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import NamedTuple, Protocol

from paged_infer.engine.defer_sigint import defer_sigint
from paged_infer.engine.engine_core import SIGNALS, run_engine
from paged_infer.engine.process_messages import EngineSpec


class Process(Protocol):
    """The part of ``multiprocessing.Process`` that is used."""

    @property
    def exitcode(self) -> int | None: ...

    def kill(self) -> None: ...

    def join(self, timeout: float | None = None) -> None: ...


class StartedProcess(NamedTuple):
    """A process that runs ``engine_core``. ``has_own_clock``: its ``time.perf_counter`` may differ from ours."""

    process: Process
    connection: Connection
    has_own_clock: bool = False


def spawn(spec: EngineSpec, name: str) -> StartedProcess:
    """Start ``run_engine`` in a process on this machine.

    The child inherits the signal mask, so that no Ctrl-C interrupts its imports; ``run_engine`` unblocks them. In this
    process, Ctrl-C is deferred until the child has been started, and then ends it.
    """
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=run_engine, args=(theirs, spec), name=name)
    resource_tracker.ensure_running()  # starting it unblocks them
    try:
        with defer_sigint():
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
    except BaseException:
        if process.pid is not None:
            process.kill()
            process.join()
        raise
    theirs.close()
    return StartedProcess(process, ours)


def describe_exit(exitcode: int | None) -> str:
    """
    >>> describe_exit(-9), describe_exit(1)
    ('killed by SIGKILL', 'exit status 1')
    """
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exit status {exitcode}"
