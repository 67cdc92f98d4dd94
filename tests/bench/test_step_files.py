"""The files of `make gpu`: who may write to OUT, what the tar keeps where there is too much, and what is printed."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import step_results
from step_results import (
    LOG_END_BYTES,
    LOG_START_BYTES,
    PRINTED_CHARACTERS,
    READ_LIMIT,
    TAIL_LINES,
    Results,
    StepResult,
    pack,
)
from step_runner import ROOT, Step, run_steps
from test_step_results import read_tar

# -- OUT


@pytest.mark.parametrize("also_work", [False, True], ids=["OUT", "OUT and the temporary folder"])
def test_what_cannot_be_saved_is_printed_once_and_the_steps_go_on(also_work, tmp_path, capsys):
    results = Results(tmp_path / "out", "made-up machine")
    gone = [tmp_path / "out", *([results.work] if also_work else [])]
    steps = [Step(name, ("rm", "-rf", *map(str, gone)), 1.0) for name in ("one", "two")]
    status = run_steps([*steps, Step("bad", ("sh", "-c", "echo so it ends; exit 3"), 1.0)], results, 1e6)
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


def test_no_temporary_folder_is_left_by_a_command_that_ends_early(tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("TMPDIR", str(work))
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / '.ci')]}; import pathlib, step_results"
    code += "; results = step_results.Results(pathlib.Path(sys.argv[1]), 'made-up machine'); sys.exit('so it ends')"
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert ran.stderr == "so it ends\n" and (tmp_path / "out" / "summary.json").exists()
    assert list(work.iterdir()) == []


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
