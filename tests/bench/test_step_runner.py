"""The steps of `make gpu`: each is bounded, ended with all its processes and reported, whatever the others do."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import gpu
import pytest
import step_runner
from holding import LIMIT_S, until
from hypothesis import example, given
from hypothesis import strategies as st
from step_results import Results, StepResult
from step_runner import ENDING, RESERVE_S, Step, limit_of, run_steps, told_s

HOURS_S = 100 * LIMIT_S


def python(name: str, code: str, *arguments: object, share: float = 1.0, **options) -> Step:
    return Step(name, (sys.executable, "-c", code, *map(str, arguments)), share, **options)


class Clock(SimpleNamespace):
    """A stand-in for ``time``: it stands still until ``event()`` is true; then ``passing_s`` pass at once.

    From then on it runs slowly, so that a busy machine has time to end a step, and a signal that is lost is followed by
    the next.
    """

    def __init__(self, event: Callable[[], object], passing_s: float) -> None:
        super().__init__(strftime=time.strftime, sleep=time.sleep)
        self._event, self._passing_s = event, passing_s
        self._start_s: float | None = None  # of the passing, on the real clock

    def monotonic(self) -> float:
        if self._start_s is None and self._event():
            self._start_s = time.monotonic()
        return 0.0 if self._start_s is None else self._passing_s + (time.monotonic() - self._start_s) / 30


@pytest.fixture
def results(tmp_path, monkeypatch) -> Results:
    monkeypatch.setattr(step_runner, "SAVE_EVERY_S", 0.05)
    results = Results(tmp_path / "out", "made-up machine")
    monkeypatch.setattr(results, "remove_work", lambda: None)
    return results


def run_until(event: Callable[[], object], steps: list[Step], results: Results, monkeypatch) -> list[str]:
    """Run the steps; once ``event()`` is true, the limit of the running step has passed. Returns the outcomes."""
    monkeypatch.setattr(step_runner, "time", Clock(event, (0.75 if len(steps) > 1 else 2) * HOURS_S))
    run_steps(steps, results, HOURS_S)
    return [step.outcome for step in results.steps]


HOLD = """
import fcntl, pathlib, signal, sys, time
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)  # until this process ends
if "stubborn" in sys.argv:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
print("I hang", flush=True)
pathlib.Path(sys.argv[2]).touch()
time.sleep(10_000)
"""


def assert_ended(lock: Path) -> None:
    with lock.open() as file:
        until(lambda: can_lock(file), lambda: "the process has not ended")


def can_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# -- Outcomes


def test_every_step_is_run_and_reported_whatever_the_others_do(tmp_path, results, monkeypatch, capsys):
    lock, hangs = tmp_path / "lock", tmp_path / "hangs"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    steps = [
        python("fine", "print('well done')"),
        python("fails", "import sys; print('oh', file=sys.stderr); sys.exit(3)"),
        python("hangs", parent, HOLD, lock, hangs),
        python("needy", "1 / 0", skipped="needs CUDA"),
        python("last", "import os; print(os.environ['SEEN'])", environment={"SEEN": "also run"}),
    ]
    outcomes = run_until(hangs.exists, steps, results, monkeypatch)
    limit_s = results.steps[2].limit_s
    assert outcomes == [
        "ok", "failed, exit status 3", f"stopped after {limit_s:.0f} s", "skipped: needs CUDA", "ok"
    ]  # fmt: skip
    logs = {one.name: (results.work / one.log).read_text() for one in results.steps if one.log}
    for name, said in (("fine", "well done"), ("fails", "oh"), ("hangs", "I hang"), ("last", "also run")):
        assert said in logs[name] and logs[name].startswith(f"$ {sys.executable} -c")
    assert "needy" not in logs
    assert_ended(lock)
    assert "fails: failed, exit status 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "skipped", "status"), [("", "", 0), ("import sys; sys.exit(1)", "", 1), ("1 / 0", "needs CUDA", 0)]
)
def test_the_exit_status_is_1_if_a_step_has_failed(code, skipped, status, results):
    assert run_steps([python("one", code, skipped=skipped)], results, HOURS_S) == status


def test_a_program_that_is_not_there_is_a_failed_step(results):
    assert run_steps([Step("one", ("/not/there",), 1.0), python("two", "")], results, HOURS_S) == 1
    assert results.steps[0].outcome == "failed: [Errno 2] No such file or directory: '/not/there'"
    assert results.steps[1].outcome == "ok"


def test_a_step_with_no_time_left_is_not_run_and_has_failed(results):
    assert run_steps([python("one", "")], results, RESERVE_S + 1) == 1
    assert results.steps == [StepResult("one", "not run: no time was left", 0.0, 1.0)]


# -- Ending a step


@pytest.mark.parametrize("is_daemon", [False, True], ids=["in its group", "a daemon"])
def test_what_a_finished_step_leaves_running_is_ended_and_no_other_child_is(is_daemon, tmp_path, results):
    lock, hangs = tmp_path / "lock", tmp_path / "hangs"
    leaves = f"""
import pathlib, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {HOLD!r}, *sys.argv[1:]], start_new_session={is_daemon})
while not pathlib.Path(sys.argv[2]).exists():
    time.sleep(0.01)
"""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        assert run_steps([python("leaves", leaves, lock, hangs)], results, HOURS_S) == 0
        assert_ended(lock)
        assert other.poll() is None


def test_a_step_that_ignores_sigint_and_sigterm_is_killed_with_its_children(tmp_path, results, monkeypatch):
    monkeypatch.setattr(step_runner, "ENDING", tuple((number, 0.0) for number, _ in ENDING))
    locks, hangs = (tmp_path / "parent", tmp_path / "child"), tmp_path / "hangs"
    both = f"""
import fcntl, pathlib, signal, subprocess, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
subprocess.run([sys.executable, "-c", {HOLD!r}, *sys.argv[2:]])
"""
    run_until(hangs.exists, [python("stubborn", both, *locks, hangs, "stubborn")], results, monkeypatch)
    for lock in locks:
        assert_ended(lock)


def test_a_signal_while_a_step_is_ended_kills_all_of_it(tmp_path, results, monkeypatch):
    monkeypatch.setattr(step_runner, "ENDING", tuple((number, HOURS_S) for number, _ in ENDING))
    lock, hangs = tmp_path / "lock", tmp_path / "hangs"
    parent = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]).wait()"
    clock = Clock(hangs.exists, 2 * HOURS_S)
    clock.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGTERM)  # while it waits for the step's end
    monkeypatch.setattr(step_runner, "time", clock)
    steps = [python("stubborn", parent, HOLD, lock, hangs, "stubborn")]
    assert run_steps(steps, results, HOURS_S) == 128 + signal.SIGTERM
    assert_ended(lock)


def test_a_signal_during_the_last_save_loses_nothing(results, monkeypatch):
    save = results.save

    def interrupted() -> None:
        if results.steps[0].outcome == "ok":
            os.kill(os.getpid(), signal.SIGTERM)
        save()

    monkeypatch.setattr(results, "save", interrupted)
    assert run_steps([python("one", "")], results, HOURS_S) == 0
    assert json.loads(results.summary.read_text())["steps"][0]["outcome"] == "ok"


def test_processes_may_have_names_that_are_not_text(results):
    rename = "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xff) \\xfe'); print('renamed', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", rename], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"renamed\n"
        assert run_steps([python("one", "")], results, HOURS_S) == 0
        other.communicate(b"\n")


@pytest.mark.parametrize("parallel", [(), ("-p", "xdist", "-n", "1")], ids=["one process", "xdist"])
def test_pytest_that_is_stopped_at_its_limit_still_prints_what_failed(parallel, tmp_path, results, monkeypatch):
    tests, hangs = tmp_path / "test_made_up.py", tmp_path / "hangs"
    tests.write_text(f"""
import pathlib, time

def test_that_fails():
    left, right = 6 * 7, 43
    assert left == right

def test_that_hangs():
    pathlib.Path({str(hangs)!r}).touch()
    time.sleep(10_000)
""")
    command = gpu._tests(str(tests), options=parallel)

    def fails_and_hangs() -> bool:
        return hangs.exists() and "F" in (results.work / "logs/tests.log").read_text().partition("\n")[2]

    few = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # importing plugins takes long
    outcomes = run_until(fails_and_hangs, [Step("tests", command, 1.0, few)], results, monkeypatch)
    assert outcomes[0].startswith("stopped after")
    log = (results.work / "logs/tests.log").read_text()
    assert "= FAILURES =" in log and "E   assert 42 == 43" in log, log
    assert "FAILED" in log.rpartition("short test summary")[2]


def test_a_step_can_be_interrupted_where_this_command_ignores_sigint(results):
    """As a command does that a shell starts with &."""
    show = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run_steps([python("one", show)], results, HOURS_S)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert (results.work / "logs/one.log").read_text().splitlines()[-1] == "True"


def test_a_callers_paths_are_kept_behind_the_source_tree(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/their/triton:/other")
    assert step_runner.environment()["PYTHONPATH"].split(os.pathsep) == [str(gpu.ROOT), "/their/triton", "/other"]


# -- Time


@given(
    names=st.lists(st.sampled_from(gpu.NAMES), min_size=1, unique=True),
    limit_s=st.floats(26, 600),
    used=st.lists(st.floats(0, 1), min_size=20, max_size=20),
    has_cuda=st.booleans(),
)
@example(names=list(gpu.NAMES), limit_s=480.0, used=[1.0] * 20, has_cuda=True)
@example(names=["ladder"], limit_s=170.0, used=[1.0] * 20, has_cuda=True)
def test_whatever_the_steps_take_all_of_it_ends_before_the_limit(names, limit_s, used, has_cuda):
    """Each uses its limit or a part of it; one that has to be killed takes as long as that takes."""
    clock = SimpleNamespace(now_s=0.0, strftime=time.strftime)
    clock.monotonic = lambda: clock.now_s
    limits = []

    def take(step: Step, result: StepResult, _: object) -> None:
        assert told_s(result.limit_s) < result.limit_s
        share = used[len(limits)]
        limits.append(result.limit_s)
        clock.now_s += share * result.limit_s + (sum(wait_s for _, wait_s in ENDING) if share == 1 else 0)
        result.outcome = "ok"

    steps = gpu.gpu_steps(names, Path("figures"), has_cuda, True)
    nothing = {name: lambda *_: "" for name in ("save", "close", "printed", "remove_work")}
    results = SimpleNamespace(steps=[], tar="", have_failed=False, **nothing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_runner, "time", clock)
        patch.setattr(step_runner, "_run_step", take)
        run_steps(steps, results, limit_s)
    assert clock.now_s < limit_s
    assert len(results.steps) == len(steps)


@pytest.mark.parametrize("limit_s", [60, 170, 480, 600])
@pytest.mark.parametrize("num_steps", range(1, len(gpu.NAMES) + 1))
def test_the_limits_of_steps_add_up_to_less_than_the_limit(num_steps, limit_s):
    steps = gpu.gpu_steps(gpu.NAMES[:num_steps], Path("figures"), True, True)
    left_s, limits = limit_s - RESERVE_S, []
    for index, step in enumerate(steps):
        limits.append(limit_of(step, steps[index + 1 :], left_s))
        left_s -= limits[-1]
    assert sum(limits) == pytest.approx(limit_s - RESERVE_S) and sum(limits) < limit_s
    assert sum(wait_s for _, wait_s in ENDING) < RESERVE_S


def test_time_that_a_step_leaves_goes_to_those_after_it():
    steps = [Step(name, (), share) for name, share in (("a", 1.0), ("b", 2.0), ("c", 1.0))]
    steps.append(Step("d", (), 9.0, skipped="needs CUDA"))
    assert limit_of(steps[0], steps[1:], 40.0) == 10.0
    assert limit_of(steps[1], steps[2:], 40.0) == pytest.approx(40 * 2 / 3)  # the first took no time
    assert limit_of(steps[2], steps[3:], 39.0) == 39.0
