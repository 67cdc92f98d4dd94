"""`make gpu-first`: a line for each result at once, on the screen and in first.jsonl, whatever else fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import first_stages
import gpu
import gpu_first
import pytest
import torch
from first_stages import TRACEBACK_LINES, Lines
from gpu import Device
from step_results import PART
from step_runner import ROOT, Step
from typer.testing import CliRunner

from paged_infer.bench.kernels import checks
from paged_infer.bench.kernels.checks import CheckResult


def stored(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- Lines


def test_a_result_is_on_disk_before_it_is_printed(tmp_path, monkeypatch):
    """And before anything else starts: the connection to the screen may be lost by then."""
    path = tmp_path / "first.jsonl"
    seen = []
    monkeypatch.setattr("builtins.print", lambda text, flush: seen.append((text[9:], flush, stored(path))))
    lines = Lines("machine", path)
    lines.write("rates", {"copy": 1234.5678, "name": "x"})
    lines.write("more", {}, {"traceback": ["not shown"]})
    first = {"stage": "machine", "what": "rates", "copy": 1234.5678, "name": "x"}
    second = {"stage": "machine", "what": "more", "traceback": ["not shown"]}
    assert seen == [
        ("machine, rates: copy 1235, name x", True, [first]), ("machine, more: ", True, [first, second])
    ]  # fmt: skip


def test_an_exception_is_its_last_lines_and_the_next_result_follows(tmp_path, capsys):
    def deep(depth: int) -> dict:
        if depth == 0:
            raise RuntimeError("an illegal memory access")
        return shallow(depth)

    def shallow(depth: int) -> dict:
        return deep(depth - 1)

    lines = Lines("engines", tmp_path / "first.jsonl")
    lines.measure("graphs", lambda: deep(20))
    lines.measure("ahead", lambda: {"tokens": 3})
    failed, fine = stored(tmp_path / "first.jsonl")
    assert failed["failed"] == "RuntimeError: an illegal memory access"
    assert len(failed["traceback"]) == TRACEBACK_LINES and failed["traceback"][-1] == failed["failed"]
    assert (fine["what"], fine["tokens"]) == ("ahead", 3) and fine["seconds"] >= 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1 : 1 + TRACEBACK_LINES] == failed["traceback"]
    assert lines.num_failed == 1


def test_what_is_being_measured_when_the_time_is_over_is_named(tmp_path):
    path = tmp_path / "first.jsonl"
    code = f"""
import sys, time
sys.path.append({str(ROOT / ".ci")!r})
import first_stages

def hang():
    print("now", flush=True)
    time.sleep(10_000)

first_stages.STAGES["hangs"] = lambda lines: lines.measure("a kernel", hang)
sys.exit(first_stages.run_stage("hangs", {str(path)!r}))
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert child.stdout.readline() == "now\n"
    child.send_signal(signal.SIGINT)
    _, log = child.communicate()
    assert child.returncode == 1 and "in hang\n" in log
    (line,) = stored(path)
    assert (line["what"], line["failed"]) == ("a kernel", "KeyboardInterrupt")
    assert "in hang" in "\n".join(line["traceback"])


def test_a_stage_that_cannot_begin_is_a_result_too(tmp_path, monkeypatch, capsys):
    def broken(_: Lines) -> None:
        raise ValueError("one block does not fit")

    monkeypatch.setitem(first_stages.STAGES, "throughput", broken)
    monkeypatch.setattr(first_stages, "end_with_parent", lambda: None)
    monkeypatch.setattr(first_stages, "faulthandler", SimpleNamespace(register=lambda *_, **__: None))
    assert first_stages.run_stage("throughput", str(tmp_path / "first.jsonl")) == 1
    assert stored(tmp_path / "first.jsonl")[0]["failed"] == "ValueError: one block does not fit"
    assert "ValueError: one block does not fit" in capsys.readouterr().out


def test_a_result_that_cannot_be_written_is_still_printed(tmp_path, capsys):
    Lines("machine", tmp_path / "gone" / "first.jsonl").write("rates", {"copy": 2.0})
    why, line = capsys.readouterr().out.splitlines()
    assert "gone/first.jsonl cannot be written: [Errno 2]" in why and line.endswith("machine, rates: copy 2")


# -- Stages, on a CPU

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there: make gpu-first itself")


def test_the_machine_is_described(tmp_path, monkeypatch):
    monkeypatch.setattr("paged_infer.bench.roofline.CPU_BUFFER_BYTES", 2**22)
    monkeypatch.setattr("paged_infer.bench.roofline.CPU_MATMUL_SIZE", 64)
    lines = Lines("machine", tmp_path / "first.jsonl")
    first_stages.machine(lines)
    versions, limits, rates = stored(tmp_path / "first.jsonl")
    assert lines.num_failed == 0
    assert versions["torch"] == torch.__version__ and versions["usable_cores"] >= 1
    assert versions["nvidia-smi"].startswith("none: ")
    assert limits["ulimit -n"] != 0
    assert rates["copy_bytes_per_s"] > 0 and rates["matmul_flops_per_s"] > 0


def test_a_kernel_is_checked_in_the_dtype_asked_for_and_a_wrong_one_fails(tmp_path, monkeypatch):
    def wrong(device, sizes):
        (dtype,) = sizes.tolerances
        yield CheckResult("store_kv", f"{dtype}, a case", 0.5, sizes.tolerances[dtype])

    lines = Lines("kernels", tmp_path / "first.jsonl")
    first_stages.check(lines, "store_kv:bfloat16")
    assert lines.num_failed == 0
    monkeypatch.setitem(checks.CHECKS, "store_kv", wrong)
    first_stages.check(lines, "store_kv:float32")
    right, other = stored(tmp_path / "first.jsonl")
    assert (right["what"], right["error"], right["cases"]) == ("store_kv:bfloat16", 0.0, 1)
    assert other["wrong"] == ["torch.float32, a case: 0.5 > 1e-05"]
    assert lines.num_failed == 1


def test_every_kernel_is_checked_in_both_dtypes_and_a_process_that_dies_is_named(tmp_path, monkeypatch):
    """The processes do nothing, except for one that is killed."""
    path = tmp_path / "first.jsonl"
    code = "import os, signal, sys; 'sample:float32' in sys.argv and os.kill(os.getpid(), signal.SIGKILL)"
    ran = []

    def run(command: list[str], env: dict[str, str]):
        ran.append(command[3:])
        return subprocess.CompletedProcess(
            command, subprocess.call([sys.executable, "-c", code, *command[2:]], env=env)
        )

    monkeypatch.setattr(first_stages, "subprocess", SimpleNamespace(run=run))
    lines = Lines("kernels", path)
    first_stages.kernels(lines)
    checked = sorted(job for _, *jobs in ran for job in jobs)
    assert checked == sorted(f"{kernel}:{dtype}" for kernel in checks.CHECKS for dtype in ("bfloat16", "float32"))
    (dead,) = stored(path)
    assert dead["failed"] == "ended by SIGKILL" and "sample:float32" in dead["what"]
    assert lines.num_failed == 1


def test_engines_give_the_same_tokens_and_throughput_its_share_of_the_floor(tmp_path):
    path = tmp_path / "first.jsonl"
    engines, throughput = Lines("engines", path), Lines("throughput", path)
    first_stages.engines(engines)
    first_stages.throughput(throughput)
    graphs, eager, ahead, few, many = stored(path)
    assert engines.num_failed == throughput.num_failed == 0
    assert (graphs["what"], graphs["skipped"]) == ("graphs", "needs CUDA")
    for line in (eager, ahead):
        assert line["same tokens"] == "2 of 2" and line["tokens/s"] > 0
    assert [line["what"] for line in (few, many)] == ["2 requests", "4 requests"]
    for line in (few, many):
        assert line["steps"] > 0 and line["share of the floor"] > 0 and line["span_s"]["model"] > 0
        assert line["max_num_batched_tokens"] > 0


# -- The command


def test_the_stages_are_run_and_their_results_stay_beside_those_of_make_gpu(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "find_device", lambda: Device("Made-up GPU", False, "torch 3"))
    code = """
import sys
sys.path.append(".ci")
from first_stages import Lines
from pathlib import Path
Lines("machine", Path(sys.argv[1])).write("rates", {"copy": 2.0})
print("for the log", file=sys.stderr)
"""

    def stages(lines: Path, has_cuda: bool) -> list[Step]:
        return [Step("machine", (sys.executable, "-c", code, str(lines)), 1.0, is_shown=True)]

    monkeypatch.setattr(gpu_first, "stages", stages)
    of_make_gpu = ("results.tar.gz", "summary.json", "previous-results.tar.gz", PART)
    for name in of_make_gpu[:3]:
        (tmp_path / name).write_text("of make gpu")
    for _ in range(2):
        assert CliRunner().invoke(gpu_first.app, ["--out", str(tmp_path)]).exit_code == 0
    began, measured, again, and_measured = stored(tmp_path / "first.jsonl")
    assert measured == and_measured == {"stage": "machine", "what": "rates", "copy": 2.0}
    assert began["device"] == again["device"] == "Made-up GPU, torch 3: no CUDA device"
    screen = capfd.readouterr().out
    assert "machine, rates: copy 2" in screen and "for the log" not in screen
    of_first = ("first.jsonl", "first-results.tar.gz", "first-summary.json", "previous-first-results.tar.gz")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(of_first + of_make_gpu[:3])
    assert len(of_first + of_make_gpu) == 8 and (tmp_path / "summary.json").read_text() == "of make gpu"


def test_every_stage_is_there_and_its_time_is_under_the_limit():
    steps = gpu_first.stages(Path("first.jsonl"), has_cuda=True)
    assert [step.name for step in steps] == ["machine", "kernels", "engines", "throughput"]
    for step in steps:
        assert Path(step.command[1]).is_file() and step.command[2] in first_stages.STAGES
    assert gpu_first.LIMIT_S == 170
