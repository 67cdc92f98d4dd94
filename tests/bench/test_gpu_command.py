"""`make gpu`: every step is run, bounded, logged and reported, whatever the others did; notebooks are scripts."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import gpu
import IPython.display
import notebook_script
import pytest
import torch
from gpu import Step, StepResult, gpu_steps, pack, run_steps, slug, write_summary
from holding import LIMIT_S, until
from typer.testing import CliRunner

from paged_infer.bench.speed import cli as speed_cli
from paged_infer.bench.speed.ladder import Ladder
from paged_infer.bench.tables import plain_table

ROOT = gpu.ROOT
NOTEBOOK = ROOT / ".ci/notebook_script.py"
FIGURE = "from paged_infer.viz.style import new_picture\nfigure = new_picture(2, 1)\n"


def python(name: str, code: str, limit_s: float = LIMIT_S) -> Step:
    return Step(name, (sys.executable, "-c", code), limit_s)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(NOTEBOOK), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment)


def invoke(*arguments: str):
    return CliRunner().invoke(gpu.app, [*arguments])


# -- Steps


def test_every_step_is_run_and_reported_whatever_the_others_do(tmp_path, monkeypatch):
    """The limit of the step that hangs passes when its own child is there to be ended, and not before."""
    hangs_s, is_alive, hangs_now = 1.2, tmp_path / "alive", tmp_path / "hangs"
    grandchild = f"""
import fcntl, pathlib, time
lock = open({str(is_alive)!r}, "w")
fcntl.flock(lock, fcntl.LOCK_EX)  # until it ends
print("I hang", flush=True)
pathlib.Path({str(hangs_now)!r}).touch()
time.sleep(10_000)
"""
    hangs = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"

    class Child(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            if timeout == hangs_s:
                until(hangs_now.exists)
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Child}))
    steps = [
        python("fine", "print('well done')"),
        python("fails", "import sys; print('oh', file=sys.stderr); sys.exit(3)"),
        python("hangs", hangs, limit_s=hangs_s),
        Step("last", (sys.executable, "-c", "import os; print(os.environ['SEEN'])"), LIMIT_S, {"SEEN": "also run"}),
    ]
    out = tmp_path / "gpu-made-up"
    results = run_steps(steps, out, total_limit_s=100 * LIMIT_S)
    assert [(result.name, result.outcome) for result in results] == [
        ("fine", "ok"), ("fails", "failed, exit status 3"), ("hangs", "stopped after 1 s"), ("last", "ok"),
    ]  # fmt: skip
    logs = {result.name: (out / result.log).read_text() for result in results}
    for name, said in (("fine", "well done"), ("fails", "oh"), ("hangs", "I hang"), ("last", "also run")):
        assert said in logs[name] and logs[name].startswith(f"$ {sys.executable} -c")
    with is_alive.open() as lock:
        until(lambda: can_lock(lock), lambda: "a step's own children end with it")

    text = write_summary(results, out)
    assert [line.split()[0] for line in text.splitlines()] == [
        "gpu-made-up:", "step", "fine", "fails", "hangs", "last",
    ]  # fmt: skip
    assert str(out / "logs" / "hangs.log") in text
    stored = json.loads((out / "summary.json").read_text())
    assert [StepResult(**one) for one in stored] == results
    with tarfile.open(pack(out)) as tar:
        assert {f"gpu-made-up/logs/{step.name}.log" for step in steps} <= set(tar.getnames())
        assert "gpu-made-up/summary.txt" in tar.getnames()


def can_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_when_all_the_time_has_passed_the_rest_is_reported_as_not_run(tmp_path, monkeypatch):
    moments = iter([0.0, 0.0, 0.0, 1.4, 1.4])  # all begins; the first step begins, twice, and ends; the second
    clock = SimpleNamespace(perf_counter=lambda: next(moments), strftime=time.strftime)
    monkeypatch.setattr(gpu, "time", clock)
    steps = [python("long", "import time; time.sleep(10_000)"), python("never", "print(1)")]
    results = run_steps(steps, tmp_path, total_limit_s=1.4)
    assert [(r.outcome, r.log) for r in results] == [
        ("stopped after 1 s", "logs/long.log"),
        ("not run: 1.4 s had passed", ""),
    ]


def test_the_steps_run_what_is_there(tmp_path):
    steps = {step.name: step for step in gpu_steps(tmp_path)}
    assert list(steps)[:6] == [
        "kernel-tests",
        "bench-kernels",
        "bench-ladder",
        "bench-throughput",
        "bench-optimisations",
        "compile-only",
    ]
    notebooks = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert list(steps)[6:] == [f"notebook-{stem}" for stem in notebooks]
    for step in steps.values():
        assert step.command[1] != "-m" or importlib.util.find_spec(step.command[2]) is not None
        for argument in step.command:
            assert not argument.endswith((".py", ".ipynb")) or Path(argument).is_file()
    assert gpu.TOTAL_LIMIT_S < 9 * 60
    assert max(step.limit_s for step in steps.values()) < gpu.TOTAL_LIMIT_S / 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_the_kernel_tests_need_no_conftest_and_are_skipped_without_a_gpu(tmp_path):
    result = run_steps(gpu_steps(tmp_path)[:1], tmp_path)[0]
    log = (tmp_path / result.log).read_text()
    assert result.passed, log
    assert " skipped" in log and "passed" not in log and "warning" not in log


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_cuda_it_says_so_in_one_line(tmp_path):
    result = invoke("--out", str(tmp_path))
    assert result.exit_code == 2
    assert result.output == "error: there is no CUDA device here: nothing to run\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("status", "exit_code"), [(0, 0), (1, 1)])
def test_the_results_are_named_after_the_device(status, exit_code, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Made-up GPU (80 GB)")
    monkeypatch.setattr(gpu, "gpu_steps", lambda out: [python("one", f"import sys; sys.exit({status})")])
    result = invoke("--out", str(tmp_path))
    assert result.exit_code == exit_code
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpu-made-up-gpu-80-gb", "gpu-made-up-gpu-80-gb.tar.gz",
    ]  # fmt: skip
    assert str(tmp_path / "gpu-made-up-gpu-80-gb.tar.gz") in result.output


def test_names_become_folder_names_and_tables_line_up():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert plain_table("ages", ["who", "years"], [["Mia", "7"]]) == "ages\nwho  years\nMia      7"


def test_the_ladder_step_writes_its_numbers_and_its_picture(tmp_path):
    command = {step.name: step.command for step in gpu.gpu_steps(tmp_path)}["bench-ladder"]
    small = ["--num-requests", "2", "--shortest", "2", "--longest", "4", "--repeats", "1"]
    result = CliRunner().invoke(speed_cli.app, [*command[command.index("ladder") :], *small])
    assert result.exit_code == 0, result.output
    report = Ladder.read(tmp_path / "bench-ladder.json")
    assert [rung.name for rung in report.entries] == ["static", "paged", "transformers", "transformers static"]
    assert (tmp_path / "bench-ladder.png").exists()


def test_what_make_gpu_runs_imports_nothing_that_a_bare_machine_lacks(tmp_path):
    """Neither rich (which the command line proper is drawn with), nor Jupyter, nor what only tests need."""
    show = "from IPython.display import HTML, display\n" + FIGURE + "display(HTML('x'), figure)"
    path = save_notebook(tmp_path / "bare.ipynb", show)
    missing = ("rich", "hypothesis", "IPython", "ipywidgets", "nbformat", "nbval")
    code = f"""
import sys
sys.modules |= dict.fromkeys({missing!r})  # an import of any of them fails
sys.path.append({str(ROOT / ".ci")!r})
import gpu, notebook_script
from paged_infer.bench import workloads
from paged_infer.bench.kernels import checks, cli, comparisons, compile_table, figure, launches
from paged_infer.bench.peers import peers, transformers_peers
from paged_infer.bench.speed import baselines, cli, ladder, optimisations, speed_figure, tables
from paged_infer.bench.tables import print_table
print_table("ages", ("who", "years"), [("Mia", "7")], ["bold red"])
import paged_infer.llm
from pathlib import Path
notebook_script.run_notebook(Path({str(path)!r}), Path({str(tmp_path)!r}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "\nages\nwho  years\nMia      7\n" in result.stdout
    assert (tmp_path / "bare-1.png").exists()


# -- Notebooks


def save_notebook(path: Path, *cells: str | tuple[str, str]) -> Path:
    """Code cells, of which some have a tag."""
    pairs = [cell if isinstance(cell, tuple) else (cell, "") for cell in cells]
    as_json = [
        {"cell_type": "code", "source": source.splitlines(keepends=True), "metadata": {"tags": [tag] if tag else []}}
        for source, tag in pairs
    ]
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["# Hello"]}, *as_json]}))
    return path


def test_cells_share_one_namespace_and_only_jupyters_own_lines_are_left_out(tmp_path):
    path = save_notebook(
        tmp_path / "a.ipynb",
        "%matplotlib inline\nx = 6\nfor i in range(2):\n    %time x\n    !ls\n    x += i",
        "%%time\nx = 1000",
        "import asyncio\nawait asyncio.sleep(0)\nx * 6",
        "x * 1000;",
        ("1 / 0", "raises-exception"),
        "from IPython.display import display\ndisplay(x)\nimport os\nprint(os.path.basename(os.getcwd()))",
    )
    result = run_script(str(path))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if not line.startswith(("---", "    "))]
    raised = "raised, as it should: ZeroDivisionError: division by zero"
    assert lines == ["42", raised, "7", tmp_path.name, "a.ipynb: every cell ran"]


def test_pictures_that_a_cell_shows_or_ends_with_are_saved(tmp_path):
    path = save_notebook(tmp_path / "b.ipynb", FIGURE + "display(figure)", "figure")
    result = run_script(str(path), "--figures", str(tmp_path / "pictures"))
    assert result.returncode == 0, result.stdout + result.stderr
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [picture.name for picture in pictures] == ["b-1.png", "b-2.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("x = 1\nassert x == 2", 'File "c.ipynb[1]", line 2'),
        (("x = 1", "raises-exception"), "c.ipynb, cell 1: it should have raised an exception"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("x = (", 'File "c.ipynb[1]", line 1'),
    ],
)
def test_a_cell_that_fails_fails_the_notebook_and_is_named(cell, said, tmp_path):
    result = run_script(str(save_notebook(tmp_path / "c.ipynb", cell)))
    assert result.returncode == 1
    assert said in result.stdout + result.stderr


def test_widgets_are_passed_over_where_they_are_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr(notebook_script, "_provide_ipython", lambda display: None)
    path = save_notebook(tmp_path / "d.ipynb", "import ipywidgets", "print('still here')")
    assert notebook_script.run_notebook(path) == 1
    said = capsys.readouterr().out
    assert "passed over: import of ipywidgets halted" in said and "still here" in said


def test_the_tour_runs_as_a_script(tmp_path, monkeypatch, capsys):
    """Shortened: every cell, on fewer and shorter requests (nbval runs all of it)."""
    monkeypatch.setattr(IPython.display, "display", None)  # and put back when the test ends
    tour = (ROOT / "notebooks" / "00_tour.ipynb").read_text(encoding="utf-8")
    for long, short in (("num_requests=8, max_tokens=96", "num_requests=2, max_tokens=8"), ("=400", "=20")):
        tour = tour.replace(long, short)
    (tmp_path / "00_tour.ipynb").write_text(tour, encoding="utf-8")
    assert notebook_script.run_notebook(tmp_path / "00_tour.ipynb", tmp_path) == 0
    assert "same tokens on every rung: True" in capsys.readouterr().out
    assert len(list(tmp_path.glob("00_tour-*.png"))) >= 2
