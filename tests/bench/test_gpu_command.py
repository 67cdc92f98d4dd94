"""`make gpu`: which steps it has, what each runs, and what it does with its options."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import gpu
import pytest
import torch
import typer
from gpu import NAMES, Device, gpu_steps, slug
from step_runner import Step
from typer.testing import CliRunner

from paged_infer.bench.kernels import cli as kernels_cli
from paged_infer.bench.speed import cli as speed_cli
from paged_infer.bench.speed.ladder import Ladder
from paged_infer.bench.tables import plain_table

ROOT = gpu.ROOT


def all_steps(*, has_cuda: bool = True, has_xdist: bool = True) -> dict[str, Step]:
    return {step.name: step for step in gpu_steps(NAMES, Path("figures"), has_cuda, has_xdist)}


def invoke(*arguments: str):
    return CliRunner().invoke(gpu.app, [*arguments])


# -- Steps


def test_steps_come_in_the_order_of_their_worth_or_as_asked_for():
    assert NAMES == ("sweep", "throughput", "trace", "kernels", "kernel-tests", "engine-tests", "ladder")
    assert list(all_steps()) == [
        "sweep", "throughput", "optimisations", "trace", "kernels", "kernel-tests", "timing-tests", "engine-tests",
        "ladder", "predictions",
    ]  # fmt: skip
    asked = gpu_steps(["ladder", "kernel-tests", "ladder"], Path("figures"), True, True)
    assert [step.name for step in asked] == ["ladder", "kernel-tests", "timing-tests"]


@pytest.mark.parametrize("has_cuda", [True, False])
def test_every_command_is_one_that_exists(has_cuda):
    """Its modules, test files and options exist: an error here would otherwise show on a rented machine."""
    kernels = typer.Typer()
    kernels.command()(kernels_cli.kernels)
    commands = {
        "paged_infer.bench.kernels.cli": typer.main.get_command(kernels),
        "paged_infer.bench.speed.cli": typer.main.get_command(speed_cli.app),
    }
    for step in all_steps(has_cuda=has_cuda).values():
        if step.name == "predictions":
            assert step.command == (sys.executable, str(ROOT / ".ci/predictions.py"), "figures")
            continue
        python, dash, module, *arguments = (part.replace("{seconds}", "60") for part in step.command)
        assert (python, dash) == (sys.executable, "-m") and importlib.util.find_spec(module) is not None
        assert all(Path(argument).is_file() for argument in arguments if argument.endswith(".py"))
        if module in commands:
            context = commands[module].make_context(step.name, arguments)
            if isinstance(commands[module], typer.core.TyperGroup):
                name, command, rest = commands[module].resolve_command(context, arguments)
                command.make_context(name, rest)


@pytest.mark.parametrize("has_cuda", [True, False])
def test_what_breaks_a_capture_or_measures_free_memory_has_a_process_of_its_own(has_cuda):
    files = {
        step.name: [Path(argument).name for argument in step.command if argument.endswith(".py")]
        for step in all_steps(has_cuda=has_cuda).values()
        if "pytest" in step.command
    }
    assert files == {
        "kernel-tests": ["test_gpu_kernels.py", "test_gpu_attention.py", "test_gpu_few_bits.py"],
        "timing-tests": ["test_roofline.py", "test_failed_capture.py"],
        "engine-tests": ["test_gpu_engine.py"],
    }


def test_kernel_tests_run_in_parallel_where_xdist_is_installed_and_engine_tests_never_do():
    for has_xdist in (True, False):
        steps = all_steps(has_xdist=has_xdist)
        assert ("--dist" in steps["kernel-tests"].command) == has_xdist
        assert "-n" not in steps["engine-tests"].command + steps["timing-tests"].command
    command = " ".join(all_steps()["kernel-tests"].command)
    assert "-n 8 --dist worksteal" in command
    assert "--tb=short -o faulthandler_timeout=60" in command


def test_without_cuda_what_a_cpu_can_do_runs_and_the_rest_names_its_reason():
    skipped = {name: step.skipped for name, step in all_steps(has_cuda=False).items() if step.skipped}
    assert list(skipped) == ["sweep", "kernel-tests", "engine-tests", "predictions"]
    assert all(reason.startswith("needs CUDA") for reason in skipped.values())
    assert not any(step.skipped for step in all_steps().values())


def test_tests_need_neither_conftest_nor_configuration(tmp_path):
    for name, expected in (("timing-tests", " passed"), ("kernel-tests", " skipped")):
        if expected == " skipped" and torch.cuda.is_available():
            continue
        command = all_steps(has_xdist=False)[name].command
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert expected in ran.stdout and "warning" not in ran.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_ladder_step_writes_its_numbers_and_its_picture(tmp_path):
    steps = {step.name: step for step in gpu_steps(["ladder"], tmp_path, False, False)}
    command = [part.replace("{seconds}", "600") for part in steps["ladder"].command]
    small = ["--num-requests", "2", "--shortest", "2", "--longest", "4"]
    result = CliRunner().invoke(speed_cli.app, [*command[command.index("ladder") :], *small])
    assert result.exit_code == 0, result.output
    report = Ladder.read(tmp_path / "bench-ladder.json")
    assert [rung.name for rung in report.entries] == ["static", "paged", "transformers", "transformers static"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench-ladder.json", "bench-ladder.png"]


# -- The command


def test_an_unknown_step_is_one_error_that_names_it_and_those_there_are(tmp_path):
    result = invoke("--out", str(tmp_path / "out"), "--steps", "kernels compile-only")
    assert result.exit_code == 2
    assert result.output == f"error: STEPS=compile-only: no such step; there are {', '.join(NAMES)}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_limit_too_short_for_any_step_is_refused(tmp_path):
    result = invoke("--out", str(tmp_path / "out"), "--limit", "20")
    assert result.exit_code == 2 and "25" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_python_without_torch_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "FIND_DEVICE", "import sys; sys.modules['torch'] = None; import torch")
    result = invoke("--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert result.output.startswith(
        f"error: {sys.executable} cannot look for a GPU: ModuleNotFoundError: import of torch"
    )


def test_a_driver_that_does_not_answer_is_one_error_and_the_results_are_there(tmp_path, monkeypatch):
    out = tmp_path / "out"
    waits = f"import pathlib, time; assert pathlib.Path({str(out / 'summary.json')!r}).exists(); time.sleep(10_000)"
    monkeypatch.setattr(gpu, "FIND_DEVICE", waits)
    monkeypatch.setattr(gpu, "FIND_DEVICE_S", 0.5)
    result = invoke("--out", str(out))
    assert result.exit_code == 2
    assert result.output == f"error: {sys.executable} found no answer in 0.5 s: is there a GPU?\n"
    with tarfile.open(out / "results.tar.gz") as tar:
        assert tar.extractfile("summary.txt").read().startswith(b"looking for a GPU\n")


def test_an_out_that_cannot_be_written_is_one_error_that_names_it(tmp_path):
    (tmp_path / "out").write_text("")
    result = invoke("--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and result.output.count("\n") == 1
    assert result.output.startswith(f"error: OUT={tmp_path / 'out'}: results cannot be written there: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_torch_is_asked_for_the_device():
    device = gpu.find_device()
    assert (device.name, device.has_cuda) == ("cpu", False)
    assert f"torch {torch.__version__}" in device.title and device.title.endswith("no CUDA device")


@pytest.mark.parametrize("status", [0, 1])
def test_the_results_are_named_after_the_device_and_the_table_is_printed_last(status, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "find_device", lambda: Device("Made-up GPU (80 GB)", True, "torch 3"))
    ends = f"import sys; print('so it ends'); sys.exit({status})"
    monkeypatch.setattr(gpu, "gpu_steps", lambda *_: [Step("one", (sys.executable, "-c", ends), 1.0)])
    result = invoke()
    assert result.exit_code == status
    folder = tmp_path / "figures" / "gpu-made-up-gpu-80-gb"
    assert sorted(path.name for path in folder.iterdir()) == ["results.tar.gz", "summary.json"]
    with tarfile.open(folder / "results.tar.gz") as tar:
        assert sorted(tar.getnames()) == ["logs/one.log", "summary.txt"]
        table = tar.extractfile("summary.txt").read().decode()
    last = "so it ends\n" if status else "\n" + table.splitlines()[-1] + "\n"
    assert result.output.endswith(last)


@pytest.mark.parametrize("script", ["gpu", "gpu-first"])
def test_make_hands_its_variables_on_and_keeps_a_callers_paths(script):
    variables = ["OUT=a folder", "STEPS=kernels trace", "LIMIT=99", "PYTHON=python3"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": "/their/triton"}
    ran = subprocess.run(["make", "-n", script, *variables], capture_output=True, text=True, cwd=ROOT, env=environment)
    steps = ' --steps "kernels trace"' if script == "gpu" else ""
    command = f'.ci/{script.replace("-", "_")}.py --out "a folder" --limit 99{steps}'
    assert ran.stdout.strip() == f"PYTHONPATH=.:/their/triton python3 {command}"
    ran = subprocess.run(
        ["make", "-n", script], capture_output=True, text=True, cwd=ROOT, env={"PATH": "/usr/bin:/bin"}
    )
    assert ran.stdout.strip() == f"PYTHONPATH=. python3 .ci/{script.replace('-', '_')}.py"


def test_names_become_folder_names_and_tables_line_up():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert plain_table("ages", ["who", "years"], [["Mia", "7"]]) == "ages\nwho  years\nMia      7"


def test_what_a_gpu_machine_runs_imports_nothing_that_a_bare_machine_lacks():
    """Neither rich (which the command line proper is drawn with), nor Jupyter, nor what only tests need."""
    missing = ("rich", "hypothesis", "IPython", "ipywidgets", "nbformat", "nbval")
    code = f"""
import sys
sys.modules |= dict.fromkeys({missing!r})  # an import of any of them fails
sys.path.append({str(ROOT / ".ci")!r})
import gpu, gpu_first, first_stages, predictions
from paged_infer.bench import workloads
from paged_infer.bench.kernels import checks, cli, comparisons, figure, launches
from paged_infer.bench.peers import peers, transformers_peers
from paged_infer.bench.speed import baselines, cli, ladder, optimisations, speed_figure, tables
from paged_infer.bench.tables import print_table
print_table("ages", ("who", "years"), [("Mia", "7")], ["bold red"])
import paged_infer.llm
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "\nages\nwho  years\nMia      7\n" in result.stdout
