"""However the engine's process ends, its ranks end, too: Ctrl-C while it loads, computes or is idle, and SIGKILL."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from holding import until
from rank_pids import children, is_running

PROGRAM = """
import signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell has started with & ignores it
from paged_infer import LLM, SamplingParams

print("loading", flush=True)
llm = LLM(tensor_parallel_size=2, num_blocks=64, max_num_seqs=8, device="cpu", distributed_timeout=300)
print(*llm.engine.executor.pids, flush=True)
params = SamplingParams(temperature=0, max_tokens=20)
before = llm.generate("Once upon a time", params, use_tqdm=False)
try:
    print("computing", flush=True)
    while True:
        llm.generate(["Once upon a time"] * 8, params, use_tqdm=False)
except KeyboardInterrupt:
    after = llm.generate("Once upon a time", params, use_tqdm=False)
    llm.check_integrity()
    print("same" if after[0].outputs == before[0].outputs else "other", flush=True)
threading.Event().wait()
"""


@contextlib.contextmanager
def started() -> Iterator[subprocess.Popen[str]]:
    """The program, in a process group of its own, as a terminal starts it."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None and process.stderr is not None
    return process.stdout.readline().strip() or process.stderr.read()


def press_ctrl_c(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def test_ctrl_c_while_the_ranks_load_leaves_none() -> None:
    with started() as process:
        assert line(process) == "loading"
        until(lambda: len(children(process.pid)) == 2)
        pids = children(process.pid)
        press_ctrl_c(process)
        _, errors = process.communicate()
        assert process.returncode not in (0, None) and "KeyboardInterrupt" in errors
        until(lambda: not any(map(is_running, pids)))


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_ctrl_c_ends_a_call_and_the_end_of_the_process_ends_its_ranks(end: signal.Signals) -> None:
    with started() as process:
        assert line(process) == "loading"
        pids = [int(pid) for pid in line(process).split()]
        assert line(process) == "computing"
        press_ctrl_c(process)
        assert line(process) == "same"
        assert len(pids) == 2 and all(map(is_running, pids))
        os.killpg(process.pid, end)
        process.communicate()
        assert process.returncode != 0
        until(lambda: not any(map(is_running, pids)))
