"""Building the C kernels: once, again for another compiler, and with the reason where it fails."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from c_building import cache_folder, compiler_script, copying, forget, temp

from paged_infer import LLM, SamplingParams
from paged_infer.kernels import attention_backends
from paged_infer.kernels.attention_backends import attention_backend
from paged_infer.kernels.cpu import build as c_runtime
from paged_infer.kernels.cpu.build import BuildError, library, unavailable_reason

__all__ = ["cache_folder", "copying", "temp"]  # fixtures
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("cache_folder")


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_it_is_built_once_and_then_loaded(cache_folder: Path, temp: Path, copying, caplog) -> None:
    assert unavailable_reason() is None
    (built,) = cache_folder.iterdir()
    inode = built.stat().st_ino
    forget()
    assert unavailable_reason() is None
    assert [*cache_folder.iterdir()] == [built] and built.stat().st_ino == inode
    assert not [*temp.iterdir()] and not warnings(caplog)


def test_without_a_compiler_it_says_so(monkeypatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(c_runtime.shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match="no C compiler"):
        library()
    assert "no C compiler" in (unavailable_reason() or "")


def test_a_compiler_that_fails_is_quoted_in_one_line_and_leaves_nothing(
    cache_folder: Path, temp: Path, tmp_path: Path, monkeypatch
) -> None:
    complaint = r"printf 'note: see below\nerror: out of vectors\nterminated\n' >&2; exit 1"
    compiler_script(tmp_path, complaint, monkeypatch)
    assert unavailable_reason() == f"{tmp_path}/my-cc failed: error: out of vectors"
    assert not [*cache_folder.iterdir(), *temp.iterdir()]


def test_a_compiler_that_fails_without_a_word_is_named(tmp_path: Path, monkeypatch) -> None:
    compiler_script(tmp_path, "exit 3", monkeypatch)
    assert unavailable_reason() == f"{tmp_path}/my-cc failed: it gave no reason"


def test_a_compiler_that_is_not_there_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "no-such-cc"))
    assert "no-such-cc" in (unavailable_reason() or "")


def test_a_compiler_without_openmp_is_asked_again_without_in_every_process(
    tmp_path: Path, cache_folder: Path, copying, monkeypatch, caplog
) -> None:
    """So a compiler that gets OpenMP later is not left with the kernels of one thread."""
    compiler_script(tmp_path, 'case "$*" in *fopenmp*) echo no OpenMP >&2; exit 1;; esac; ' + copying, monkeypatch)
    for _ in range(2):
        forget()
        assert unavailable_reason() is None and len([*cache_folder.iterdir()]) == 1
    assert len(warnings(caplog)) == 2  # one each
    assert "run on one thread" in warnings(caplog)[0] and "no OpenMP" in warnings(caplog)[0]


def test_another_compiler_does_not_get_the_others_result(
    cache_folder: Path, tmp_path: Path, copying, monkeypatch
) -> None:
    for version in ("1.0", "2.0", "1.0"):
        compiler_script(tmp_path, f'[ "$1" = --version ] && echo {version} && exit 0; ' + copying, monkeypatch)
        forget()
        assert unavailable_reason() is None
    assert len([*cache_folder.iterdir()]) == 2


def test_arm_processors_are_told_apart(monkeypatch, tmp_path: Path) -> None:
    text = "processor : 0\nBogoMIPS : 50\nFeatures : fp asimd sve\nCPU part : 0xd40\n"
    monkeypatch.setattr(c_runtime, "Path", lambda _: tmp_path / "cpuinfo")
    described = []
    for changed in ("", "sve", "0xd40", "50"):
        (tmp_path / "cpuinfo").write_text(text.replace(changed, "x") if changed else text)
        described.append(c_runtime._processor())
    assert len(set(described)) == 3 and described[0] == described[3]  # a frequency is not what is compiled for


BUILD = "from paged_infer.kernels.cpu.build import library; print(library().panel_width())"


def test_two_processes_that_compile_at_the_same_time_both_work(
    cache_folder: Path, tmp_path: Path, copying, monkeypatch
) -> None:
    """The compiler waits until both processes have called it."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    wait = f'touch {meeting}/$$; while [ "$(ls {meeting} | wc -l)" -lt 2 ]; do sleep 0.05; done'
    compiler_script(tmp_path, f'[ "$1" = --version ] && exec cc --version; {wait}; ' + copying, monkeypatch)
    both = [subprocess.Popen([sys.executable, "-c", BUILD], stdout=subprocess.PIPE) for _ in range(2)]
    answers = [process.communicate(timeout=300)[0] for process in both]
    assert answers[0] == answers[1] != b"" and [process.returncode for process in both] == [0, 0]
    assert {path.suffix for path in cache_folder.iterdir()} == {".so"}
    assert unavailable_reason() is None


# -- what is slower than it could be --------------------------------------------------------------------------------


def test_one_line_says_why_auto_takes_a_slower_backend(monkeypatch, caplog) -> None:
    monkeypatch.setenv("CC", "no-such-cc")
    attention_backend("auto", CPU)
    (line,) = warnings(caplog)
    assert "'sdpa'" in line and "slower" in line and "no-such-cc" in line and "\n" not in line


def test_a_backend_of_ones_own_is_warned_of_its_slower_pieces(monkeypatch, caplog) -> None:
    monkeypatch.setenv("CC", "no-such-cc")
    monkeypatch.setitem(attention_backends.ATTENTION_BACKENDS, "mine", attention_backends.torch_backend)
    attention_backend("mine", CPU)
    assert "no-such-cc" in warnings(caplog)[0]


def test_on_a_gpu_without_triton_one_line_says_so(monkeypatch, caplog) -> None:
    monkeypatch.setattr(attention_backends, "can_run_on", lambda device: False)
    attention_backend("auto", torch.device("cuda"))
    (line,) = warnings(caplog)
    assert "'sdpa'" in line and "triton" in line


@pytest.mark.parametrize("name", ["torch", "sdpa", "triton"])
def test_a_backend_that_was_asked_for_compiles_nothing_and_is_no_reason_for_a_warning(
    name: str, cache_folder: Path, monkeypatch, caplog
) -> None:
    attention_backend(name, CPU)
    assert not cache_folder.exists() and not warnings(caplog)


def test_kernels_that_cannot_be_built_for_one_dtype_cost_speed_only(
    tmp_path: Path, checkpoint, copying, monkeypatch, caplog
) -> None:
    """A step in bfloat16 asks for kernels of its own, when the engine has long begun."""
    compiler_script(tmp_path, 'case "$*" in *BFLOAT16*) echo no bfloat16 >&2; exit 1;; esac; ' + copying, monkeypatch)
    params = SamplingParams(temperature=0, max_tokens=4)
    outputs = [
        LLM(checkpoint("qwen3"), dtype="bfloat16", attention_backend=backend)
        .generate([3, 1, 4], params, use_tqdm=False)[0]
        .outputs[0]
        .token_ids
        for backend in ("auto", "sdpa")
    ]
    assert outputs[0] == outputs[1]
    (line,) = warnings(caplog)
    assert "torch.bfloat16" in line and "no bfloat16" in line
