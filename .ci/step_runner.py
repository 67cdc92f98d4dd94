"""Runs steps one after the other within a time limit; what they leave is kept, whenever this process is killed.

Each step is a process of its own with a share of the time; time that it does not use goes to later steps. Results are
saved (``step_results``) after every step, every 15 s while one runs, and when the command is interrupted.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from step_results import OK, RUNNING, SKIPPED, Results, StepResult

ROOT = Path(__file__).resolve().parents[1]
SAVE_EVERY_S = 15.0
# pytest prints its failures when SIGINT ends it, and nothing on SIGTERM. While a library call hangs, Python handles
# neither; SIGTERM then ends pytest all the same, but no command of paged_infer.
ENDING = ((signal.SIGINT, 8.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0))
RESERVE_S = 15.0  # to end the last step, and to save and print the results
SHORTEST_S = 5.0  # a step with less time than this is not started
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # fastest for small shapes on a busy CPU


@dataclass(frozen=True, slots=True)
class Step:
    """A command. ``{seconds}`` in it becomes the time after which it should end by itself."""

    name: str
    command: tuple[str, ...]
    share: float  # of the time, compared with the other steps'
    environment: Mapping[str, str] = field(default_factory=dict)
    skipped: str = ""  # why it cannot run here
    is_shown: bool = False  # standard output goes to the screen, and only the rest to the step's log


def limit_of(step: Step, later: Sequence[Step], left_s: float) -> float:
    """Seconds for ``step``, if it shares ``left_s`` with the steps that come later and can run."""
    return left_s * step.share / (step.share + sum(one.share for one in later if not one.skipped))


def told_s(limit_s: float) -> int:
    """Seconds after which a step should end by itself, so that it is not ended in the middle of a measurement."""
    return max(1, int(limit_s - max(8.0, 0.15 * limit_s)))


def run_steps(steps: Sequence[Step], results: Results, limit_s: float) -> int:
    """Run every step that can run, all within ``limit_s``, and print what came of them.

    Returns the exit status: 1 if a step failed, 128 and its number after a signal.
    """
    deadline_s = time.monotonic() + limit_s - RESERVE_S
    results.steps = [StepResult(step.name) for step in steps]
    status = 0
    with interruptible(), adopting():
        try:
            for index, (step, result) in enumerate(zip(steps, results.steps, strict=True)):
                result.limit_s = round(limit_of(step, steps[index + 1 :], deadline_s - time.monotonic()), 1)
                if step.skipped:
                    result.limit_s, result.outcome = 0, f"{SKIPPED}{step.skipped}"
                elif result.limit_s < SHORTEST_S:
                    result.outcome = "not run: no time was left"
                else:
                    try:
                        _run_step(step, result, results)
                    except OSError as error:  # no space for its log, or no such program
                        result.outcome = f"failed: {error}"
            ignore_signals()  # here, where one that comes just before is still caught
        except Interrupted as signalled:
            status = 128 + signalled.number
            results.close(str(signalled))
        finally:
            results.save()
        print(f"results: {results.tar}\n{results.printed()}", flush=True)
        results.remove_work()
    return status or int(results.have_failed)


def _run_step(step: Step, result: StepResult, results: Results) -> None:
    print(f"{time.strftime('%H:%M:%S')} {step.name} (at most {result.limit_s:.0f} s)", flush=True)
    result.outcome, result.log = RUNNING, f"logs/{step.name}.log"
    command = [part.replace("{seconds}", str(told_s(result.limit_s))) for part in step.command]
    start_s, earlier = time.monotonic(), set(_children())
    with (results.work / result.log).open("wb", buffering=0) as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        results.save()  # the results of earlier steps, and that this one is running
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=None if step.is_shown else log,
            stderr=log,
            cwd=ROOT,
            env=environment() | dict(step.environment),
            start_new_session=True,  # so that its own children can be ended with it
            preexec_fn=end_with_parent,
        )
        try:
            result.outcome = _wait(child, start_s, result, results)
        except Interrupted as signalled:
            results.close(str(signalled))
            results.save()  # before anything that takes time
            raise
        finally:
            _end(child, earlier)
            result.seconds = round(time.monotonic() - start_s, 1)


def _wait(child: subprocess.Popen[bytes], start_s: float, result: StepResult, results: Results) -> str:
    """Save every ``SAVE_EVERY_S`` while the step runs; returns its outcome."""
    while (left_s := start_s + result.limit_s - time.monotonic()) > 0:
        try:
            status = child.wait(min(left_s, SAVE_EVERY_S))
        except subprocess.TimeoutExpired:
            result.seconds = round(time.monotonic() - start_s, 1)
            results.save()
        else:
            return OK if status == 0 else f"failed, exit status {status}"
    return f"stopped after {result.limit_s:.0f} s"


# -- Signals and processes


class Interrupted(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


ASK_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ignore_signals() -> None:
    for number in ASK_TO_END:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def interruptible() -> Iterator[None]:
    """The first signal that asks this process to end raises ``Interrupted``; later ones are ignored.

    Children then have the signals' usual effects, also where a shell has started this process to ignore SIGINT.
    """

    def interrupt(number: int, _: FrameType | None) -> None:
        ignore_signals()
        raise Interrupted(number)

    previous = {number: signal.signal(number, interrupt) for number in ASK_TO_END}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def end_with_parent() -> None:
    """Let the kernel kill this process if its parent dies, so that it does not keep the GPU."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def adopting() -> Iterator[None]:
    """On Linux, this process becomes the parent of those below it whose own parent has ended: daemons are found."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _end(child: subprocess.Popen[bytes], earlier: set[int]) -> None:
    """End what is left of a step: the group of processes that was started for it, then daemons with their own group.

    ``earlier`` are the children that this process had before.
    """
    *asking, (_, kill_s) = ENDING
    try:
        for number, wait_s in asking:
            if not _runs(child):
                break
            with suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            until_s = time.monotonic() + wait_s
            while _runs(child) and time.monotonic() < until_s:
                time.sleep(0.02)
    finally:  # at once, where a signal has interrupted that
        until_s = time.monotonic() + kill_s
        while _runs(child) or set(_children()) - earlier:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            for pid in set(_children()) - earlier:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > until_s:
                break
            time.sleep(0.02)


def _runs(child: subprocess.Popen[bytes]) -> bool:
    """Whether a process of its group runs."""
    return child.poll() is None or any(group == child.pid for _, _, group in _processes())


def _children() -> Iterator[int]:
    return (pid for pid, parent, _ in _processes() if parent == os.getpid())


def _processes() -> Iterator[tuple[int, int, int]]:
    """Number, parent and group of all that run. Zombies do not count."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):  # it has ended
            # The name in parentheses may be any bytes.
            state, parent, group, *_ = path.read_bytes().rpartition(b")")[2].split()
            if state != b"Z":
                yield int(path.parent.name), int(parent), int(group)


def environment() -> dict[str, str]:
    """The package from the source tree before a caller's paths, pictures without a window, no network access."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a crash in a library leaves a traceback
        "MPLBACKEND": "Agg",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
