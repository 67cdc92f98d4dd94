"""What is in OUT whenever `make gpu` is killed: one tar of all finished steps, and a summary that agrees with it."""

from __future__ import annotations

import fcntl
import json
import random
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from holding import LIMIT_S, until
from step_results import OK, Results, StepResult
from step_runner import Step, run_steps

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("one", "two", "three")
NUM_MOMENTS = 16
HOURS_S = 36_000.0
# argv: OUT, after how many lines of the two scripts it kills itself (0: never), how often it saves, and what each step
# runs in a shell, with the folder for figures as $1 and its own name as $2.
RUN = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / ".ci")!r}]
import step_results, step_runner
from pathlib import Path
out, lines_left, *commands = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[4:]
scripts = (step_results.__file__, step_runner.__file__)
NOT_COUNTED = ("_processes", "_children", "<genexpr>")  # as many lines as processes

def trace(frame, event, _):
    global lines_left
    if frame.f_code.co_filename not in scripts or frame.f_code.co_name in NOT_COUNTED:
        return None
    lines_left -= event == "line"
    if lines_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return trace

step_runner.SAVE_EVERY_S = float(sys.argv[3])
results = step_results.Results(out, "made-up machine")
steps = [
    step_runner.Step(name, ("sh", "-c", command, "sh", str(results.figures), name), 1.0)
    for name, command in zip({STEPS!r}, commands, strict=True)
]
if lines_left:
    sys.settrace(trace)
status = step_runner.run_steps(steps, results, 1e6)
sys.settrace(None)
print("lines left:", lines_left)
sys.exit(status)
"""


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path_factory, monkeypatch) -> None:
    """For commands: one that is killed leaves its folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("work")))


SAVE = 'echo "$2 was saved" > "$1/$2.txt" && echo "$2 ran"'


def run_command(out: Path, lines: int, save_every_s: float, *commands: str) -> list[str]:
    return [sys.executable, "-c", RUN, str(out), str(lines), str(save_every_s), *commands]


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


def can_lock(path: Path) -> bool:
    """Whether the process that holds it has ended."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def assert_sound(out: Path) -> list[StepResult]:
    """Few files, none below a folder; a tar that can be read, with the files of all steps that the summary calls ok."""
    assert len(list(out.rglob("*"))) <= 3
    assert all(path.is_file() for path in out.iterdir())
    kept = read_tar(out / "results.tar.gz") if (out / "results.tar.gz").exists() else {}
    if not (out / "summary.json").exists():
        return []
    steps = [StepResult(**step) for step in json.loads((out / "summary.json").read_text())["steps"]]
    assert [step.name for step in steps] in ([], list(STEPS))
    for step in steps:
        if step.outcome == OK:
            assert kept[f"figures/{step.name}.txt"] == f"{step.name} was saved\n".encode()
            assert kept[step.log].endswith(f"{step.name} ran\n".encode())
    return steps


def test_killed_at_any_moment_the_files_are_whole_and_agree(tmp_path):
    """A moment is a number of lines of the scripts: it does not depend on how busy the machine is."""
    many = 1_000_000
    whole = subprocess.run(run_command(tmp_path / "whole", many, HOURS_S, *[SAVE] * 3), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    assert [step.outcome for step in assert_sound(tmp_path / "whole")] == [OK] * 3
    num_lines = many - int(whole.stdout.rsplit(maxsplit=1)[-1])
    rng = random.Random(0)
    seen = set()
    for part in range(NUM_MOMENTS):
        line = rng.randint(part * num_lines // NUM_MOMENTS + 1, (part + 1) * num_lines // NUM_MOMENTS)
        out = tmp_path / str(line)
        killed = subprocess.run(run_command(out, line, HOURS_S, *[SAVE] * 3), capture_output=True, text=True)
        assert killed.returncode in (-signal.SIGKILL, 0), killed.stderr  # 0: it took fewer lines this time
        seen.add(tuple(step.outcome for step in assert_sound(out)))
    for states in ("running waiting waiting", "ok running waiting", "ok ok running"):
        assert tuple(states.split()) in seen


HANG = """
{SAVE} && exec {python} -c '
import fcntl, sys, time
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("I hang", flush=True)
time.sleep(10_000)' {lock}
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_what_the_running_step_has_saved_is_kept_and_the_step_is_ended(number, tmp_path):
    out, lock = tmp_path / "out", tmp_path / "lock"
    hang = HANG.format(SAVE=SAVE, python=sys.executable, lock=lock)
    command = run_command(out, 0, 0.05, SAVE, hang, SAVE)
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def is_in_the_tar() -> bool:
        assert running.poll() is None
        tar = out / "results.tar.gz"
        return tar.exists() and b"\nI hang\n" in read_tar(tar).get("logs/two.log", b"")

    until(is_in_the_tar)
    running.send_signal(number)
    said, _ = running.communicate(timeout=LIMIT_S)
    until(lambda: can_lock(lock), lambda: "the step has not ended")
    outcomes = [step.outcome for step in assert_sound(out)]
    kept = read_tar(out / "results.tar.gz")
    assert kept["figures/two.txt"] == b"two was saved\n"
    if number == signal.SIGKILL:
        assert running.returncode == -signal.SIGKILL
        assert outcomes == ["ok", "running", "waiting"]
    else:
        assert running.returncode == 128 + number
        stopped = f"stopped by {number.name}"
        assert outcomes == ["ok", stopped, f"not run: {stopped}"]
        table, _, log = said.partition("\n--- ")
        assert f"\ntwo: {stopped}" in table and log.startswith(f"two, {stopped}") and "\nI hang\n" in log


def test_while_a_step_runs_the_tar_has_the_files_of_those_before_it(tmp_path, monkeypatch):
    """Each step looks at what is there when it begins."""
    results = Results(tmp_path / "out", "made-up machine")
    monkeypatch.setattr(results, "remove_work", lambda: None)
    save = 'ls "$1"; tar -tf "$1"/*.tar.gz; grep -h outcome "$1"/summary.json; echo x > "$2/$3.txt"'
    steps = [
        Step(name, ("sh", "-c", save, "sh", str(tmp_path / "out"), str(results.figures), name), 1.0) for name in STEPS
    ]
    run_steps(steps, results, 1e6)
    saw = {name: (results.work / f"logs/{name}.log").read_text() for name in STEPS}
    for number, name in enumerate(STEPS):
        assert saw[name].count(".tar.gz\n") == 1
        outcomes = ["ok"] * number + ["running"] + ["waiting"] * (2 - number)
        assert [
            line.split('"')[3] for line in saw[name].splitlines() if "outcome" in line and "$" not in line
        ] == outcomes
        for before in STEPS[:number]:
            assert f"\nfigures/{before}.txt\n" in saw[name] and f"\nlogs/{before}.log\n" in saw[name]
        assert f"\nfigures/{name}.txt\n" not in saw[name]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "results.tar.gz", "summary.json"
    ]  # fmt: skip
