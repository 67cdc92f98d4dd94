"""Ranks that a launcher has started: each runs the same script, plans the same steps, and gives the same tokens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from paged_infer import LLM, AsyncLLM, SamplingParams
from paged_infer.execution.errors import EngineDeadError

TINY = {"block_size": 4, "max_num_seqs": 8, "num_blocks": 26, "max_model_len": 96, "device": "cpu"}
RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher", "distributed_timeout": 300}
PROMPTS = ["Once upon a time", "A story about Mia and a kite.", "A story about Mia and a red key.", "Tom was sad."]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=24),
    SamplingParams(temperature=0.9, seed=3, n=3, max_tokens=24),
    SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=1),
]

LAUNCHER = (sys.executable, "-m", "torch.distributed.run")  # torchrun

SAME = f"""
import json, os, sys, time
from paged_infer import LLM, SamplingParams
if os.environ["RANK"] == "1":
    time.perf_counter = lambda read=time.perf_counter: read() + 1000  # as on another machine
tokens = []
for policy in ("chunked", "dynamic"):
    llm = LLM(**{TINY}, **{RANKS}, scheduling_policy=policy)
    for params in {PARAMS}:
        outputs = llm.generate({PROMPTS}, params, use_tqdm=False)
        tokens.append([[one.token_ids for one in output.outputs] for output in outputs])
    llm.check_integrity()
print(json.dumps(tokens), flush=True)
"""


def test_every_rank_gives_the_tokens_of_one_process() -> None:
    """Preemption, samples that share blocks, and a policy that waits for the time."""
    run = subprocess.run(
        [*LAUNCHER, "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable, "-c", SAME],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    alone = LLM(**TINY)
    expected = [
        [[one.token_ids for one in output.outputs] for output in alone.generate(PROMPTS, params, use_tqdm=False)]
        for params in PARAMS
    ]
    assert alone.stats()["preemptions"] > 0
    lines = [line for line in run.stdout.splitlines() if line.startswith("[")]
    assert [json.loads(line) for line in lines] == [expected * 2] * 2


FAILING = f"""
import os, threading
from paged_infer import LLM, SamplingParams
rank = int(os.environ["RANK"])
try:
    LLM(**{{**{TINY}, "num_blocks": 26 + rank}}, **{RANKS})
except ValueError as error:
    print(error, flush=True)
llm = LLM(**{TINY}, **{RANKS})
if rank == 1:
    llm.generate({PROMPTS}, SamplingParams(max_tokens=5), use_tqdm=False)
    print("done", flush=True)
    threading.Event().wait()
while True:
    llm.generate({PROMPTS}, SamplingParams(max_tokens=5), use_tqdm=False)
"""


def rank_variables(rank: int, port: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in names.items()}}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def test_different_options_are_named_on_every_rank_and_a_killed_rank_is_an_error_of_the_other() -> None:
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=rank_variables(rank, port),
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert "rank 1 was started with num_blocks=27 (rank 0: 26)" in rank.stdout.readline()
        assert ranks[1].stdout is not None and ranks[1].stdout.readline() == "done\n"
        ranks[1].send_signal(signal.SIGKILL)
        _, errors = ranks[0].communicate()
        assert ranks[0].returncode == 1 and "EngineDeadError: rank 0: RuntimeError" in errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_a_rank_that_cannot_reach_rank_0_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rank_variables(1, free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EngineDeadError, match=r"rank 1: Dist.*Error"):
        LLM(**TINY, **{**RANKS, "distributed_timeout": 1})


def test_without_a_launcher_or_with_another_number_of_ranks_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"torchrun --nproc-per-node 2; RANK, .* not set"):
        LLM(**TINY, **RANKS)
    for name, value in rank_variables(0, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="tensor_parallel_size=3: the launcher has started 2 ranks"):
        LLM(**TINY, **{**RANKS, "tensor_parallel_size": 3})


def test_callers_of_only_one_rank_are_refused() -> None:
    with pytest.raises(ValueError, match=r"external_launcher.*requests would arrive at only one rank"):
        AsyncLLM(**TINY, **RANKS)
