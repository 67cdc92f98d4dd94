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
import step_results
from holding import LIMIT_S, until
from step_results import (
    LOG_END_BYTES,
    LOG_START_BYTES,
    OK,
    PRINTED_CHARACTERS,
    READ_LIMIT,
    TAIL_LINES,
    Results,
    StepResult,
    pack,
)
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
def work_folder(tmp_path_factory, monkeypatch) -> Path:
    """Of commands: one that is killed leaves its temporary folder."""
    folder = tmp_path_factory.mktemp("work")
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


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


# -- OUT


@pytest.mark.parametrize("also_work", [False, True], ids=["OUT", "OUT and the temporary folder"])
def test_what_cannot_be_saved_is_printed_once_and_the_steps_go_on(also_work, tmp_path, capsys):
    results = Results(tmp_path / "out", "made-up machine")
    gone = [tmp_path / "out", *([results.work] if also_work else [])]
    steps = [Step(name, ("rm", "-rf", *map(str, gone)), 1.0) for name in STEPS[:2]]
    status = run_steps([*steps, Step("bad", ("sh", "-c", "echo so it ends; exit 3"), 1.0)], results, HOURS_S)
    said = capsys.readouterr().out
    assert status == 1 and said.count("results cannot be saved: ") == 1
    assert "\none: ok " in said and ("\nbad: failed: " in said if also_work else said.endswith("so it ends\n"))


def test_an_out_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"OUT=.*/file/out: results cannot be written there: .* Not a directory"):
        Results(tmp_path / "file" / "out", "made-up machine")


def test_one_run_at_a_time_writes_to_an_out(tmp_path):
    results = Results(tmp_path, "made-up machine")
    for prefix in ("", "first-"):
        with pytest.raises(ValueError, match=f"OUT={tmp_path}: another run writes its results there"):
            Results(tmp_path, "made-up machine", prefix)
    results.remove_work()
    Results(tmp_path, "made-up machine").remove_work()


def test_the_tar_of_the_run_before_is_kept(tmp_path):
    for title in ("first", "second", "third"):
        results = Results(tmp_path, title)
        results.save()
        results.remove_work()
    names = ["previous-results.tar.gz", "results.tar.gz", "summary.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    tables = [read_tar(tmp_path / name)["summary.txt"].decode() for name in names[:2]]
    assert [table.splitlines()[0] for table in tables] == ["second", "third"]


def test_no_temporary_folder_is_left_by_a_command_that_ends_early(tmp_path, work_folder):
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / '.ci')]}; import pathlib, step_results"
    code += "; results = step_results.Results(pathlib.Path(sys.argv[1]), 'made-up machine'); sys.exit('so it ends')"
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert ran.stderr == "so it ends\n" and (tmp_path / "out" / "summary.json").exists()
    assert list(work_folder.iterdir()) == []


# -- The tar


def test_a_long_log_is_shortened_and_compressed_sizes_are_limited(tmp_path, monkeypatch):
    """A file that is far too large is not even read."""
    work, limit = tmp_path / "work", 300_000
    work.mkdir()
    rng = random.Random(0)
    start, end = b"it begins so ".ljust(LOG_START_BYTES, b"."), b" it ends so".rjust(LOG_END_BYTES, b".")
    (work / "long.log").write_bytes(start + bytes(9_876_543) + end)
    (work / "numbers.json").write_bytes(bytes(3 * limit))
    (work / "a.gz").write_bytes(rng.randbytes(limit - 1))
    (work / "vast.json").write_bytes(bytes(READ_LIMIT * limit + 1))
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) if path.name != "vast.json" else pytest.fail())
    packed, left_out = pack(work, limit_bytes=limit)
    assert len(packed) < limit and sorted(left_out) == ["a.gz", "vast.json"]
    (tmp_path / "packed.tar.gz").write_bytes(packed)
    kept = read_tar(tmp_path / "packed.tar.gz")
    assert sorted(kept) == ["long.log", "numbers.json"] and kept["numbers.json"] == bytes(3 * limit)
    assert kept["long.log"] == start + b"\n[9876543 bytes left out]\n" + end


def test_a_file_that_is_written_meanwhile_is_packed_as_it_is(tmp_path, monkeypatch):
    """It grows as soon as it has been read."""
    grows = tmp_path / "bench.json"
    grows.write_text("first")
    read = Path.read_bytes

    def read_and_grow(path: Path) -> bytes:
        content = read(path)
        path.write_text("first and second")
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_grow)
    packed, left_out = pack(tmp_path)
    (tmp_path / "packed.tar.gz").write_bytes(packed)
    monkeypatch.undo()
    assert read_tar(tmp_path / "packed.tar.gz") == {"bench.json": b"first"} and left_out == []


def test_what_would_make_the_tar_too_large_is_left_out_and_named(tmp_path):
    work = tmp_path / "work"
    (work / "logs").mkdir(parents=True)
    rng = random.Random(0)
    sizes = {"a.trace.gz": 90_000, "b.json": 20_000, "logs/c.log": 30_000}
    for name, size in sizes.items():
        (work / name).write_bytes(rng.randbytes(size))
    (work / "b.json.part").write_bytes(b"half")
    packed, left_out = pack(work, limit_bytes=100_000)
    (tmp_path / "packed.tar.gz").write_bytes(packed)
    assert len(packed) < 100_000
    assert {name: len(content) for name, content in read_tar(tmp_path / "packed.tar.gz").items()} == {
        "b.json": 20_000, "logs/c.log": 30_000
    }  # fmt: skip
    assert left_out == ["a.trace.gz"]


# -- What is printed


def test_only_the_end_of_a_log_is_read_to_print_it(tmp_path, monkeypatch):
    monkeypatch.setattr(step_results, "TAIL_BYTES", 10)
    results = Results(tmp_path, "made-up machine")
    results.steps = [StepResult("bad", "failed", 1.0, 2.0, "logs/bad.log")]
    (results.work / "logs/bad.log").write_bytes(b"x" * 100 + b"\nit ends so")
    assert results.printed().endswith("[101 bytes left out]\nit ends so")


@pytest.mark.parametrize("width", [20, 5_000])
@pytest.mark.parametrize("num_failed", [0, 1, 3, 9])
def test_the_table_comes_first_then_the_end_of_each_failed_log(num_failed, width, tmp_path):
    results = Results(tmp_path, "made-up machine")
    results.steps = [StepResult("fine", "ok", 1.0, 2.0, "logs/fine.log"), StepResult("late", "not run: no time")]
    for number in range(num_failed):
        results.steps.append(StepResult(f"bad{number}", "failed, exit status 1", 1.0, 2.0, f"logs/bad{number}.log"))
        lines = [f"{number} line {line} {'x' * width}" for line in range(99)] + [f"bad{number} ends so"]
        (results.work / f"logs/bad{number}.log").write_text("\n".join(lines) + "\n")
    text = results.printed()
    assert len(text) <= PRINTED_CHARACTERS
    assert text.startswith(results.table())
    rest = text.removeprefix(results.table())
    assert [line.split(",")[0] for line in rest.splitlines() if line.startswith("--- ")] == [
        f"--- bad{number}" for number in range(num_failed)
    ]
    for number in range(num_failed):
        assert f"bad{number} ends so" in rest
    if num_failed == 1 and width == 20:
        assert rest.count(" line ") == TAIL_LINES - 1
    if num_failed == 0:
        assert rest == ""
