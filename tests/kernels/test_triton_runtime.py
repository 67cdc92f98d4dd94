"""Kernels launch where they can; elsewhere an error gives the reason."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from holding import LIMIT_S

from paged_infer.kernels import triton_runtime
from paged_infer.kernels.triton_runtime import can_run_on, launch, launches_go_to

CPU = torch.device("cpu")
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from paged_infer import LLM, SamplingParams
from paged_infer.kernels.attention.flash_attention import flash_attention
outs = LLM().generate("Once upon a time", SamplingParams(max_tokens=3, temperature=0), use_tqdm=False)
print(len(outs[0].outputs[0].token_ids))
try:
    flash_attention(*torch.zeros(3, 1, 1, 2, 8))
except RuntimeError as error:
    print(error)
"""


def test_without_triton_everything_but_its_kernels_works() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=LIMIT_S)
    assert run.stdout.splitlines() == ["3", "triton is not installed: use attention_backend='torch' or 'sdpa'"], (
        run.stderr
    )


def test_a_process_that_compiles_does_not_run_kernels_on_a_cpu(monkeypatch) -> None:
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    assert not can_run_on(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="start Python with TRITON_INTERPRET=1"):
        launch(None, (1,), torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match=r"triton was imported before paged_infer\.kernels"):
        launch(None, (1,), torch.zeros(1))


def test_an_interpreter_that_fails_with_this_numpy_is_not_used(monkeypatch) -> None:
    monkeypatch.setattr(triton_runtime, "_INTERPRETER_FAILS", True)
    assert not can_run_on(CPU)
    with pytest.raises(RuntimeError, match=r"does not work with numpy .*: install triton 3\.7 or newer"):
        launch(None, (1,), torch.zeros(1))


def test_a_launch_of_nothing_is_none() -> None:
    seen = []
    with launches_go_to(lambda *call: seen.append(call), (9, 0)):
        launch("kernel", (0, 3), torch.zeros(1))
        launch("kernel", (2,), torch.zeros(1), 7, num_warps=8, D=64)
    assert [(call[0], call[1], call[3]["num_warps"], call[3]["D"]) for call in seen] == [("kernel", (2,), 8, 64)]
