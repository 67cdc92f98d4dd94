"""Two ranks in actors of a Ray cluster: the same tokens as one process, and one clear error when a rank is lost."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from paged_infer import LLM, AsyncLLM, SamplingParams
from paged_infer.execution.errors import EngineDeadError

TINY = {"block_size": 4, "max_num_seqs": 8, "num_blocks": 26, "max_model_len": 96, "device": "cpu"}
RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray", "distributed_timeout": 300}
PROMPTS = ["Once upon a time", "A story about Mia and a kite.", "A story about Mia and a red key.", "Tom was sad."]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    waits = {"raylet_start_wait_time_s": 900, "worker_register_timeout_seconds": 900}
    waits["agent_register_timeout_ms"] = 900_000
    os.environ |= {f"RAY_{name}": str(value) for name, value in waits.items()}  # also on a busy machine
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def test_two_actors_give_the_same_tokens_and_the_loss_of_one_is_one_error(cluster: Any) -> None:
    ranks, alone = LLM(**TINY, **RANKS), LLM(**TINY)
    for params in (SamplingParams(temperature=0, max_tokens=24), SamplingParams(seed=3, n=3, max_tokens=24)):
        tokens = [
            [[one.token_ids for one in output.outputs] for output in llm.generate(PROMPTS, params, use_tqdm=False)]
            for llm in (ranks, alone)
        ]
        assert tokens[0] == tokens[1]
    assert ranks.stats()["preemptions"] > 0
    assert ranks.stats()["all_reduces"] > ranks.stats()["all_gathers"] > 0 == alone.stats()["all_reduces"]
    pid = ranks.engine.executor.pids[1]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="a rank has ended"):
        ranks.generate(PROMPTS, SamplingParams(max_tokens=24), use_tqdm=False)
    with pytest.raises(EngineDeadError, match="a rank has ended"):
        ranks.generate(PROMPTS, SamplingParams(max_tokens=24), use_tqdm=False)


def test_without_ray_the_error_has_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"needs Ray: pip install 'paged-infer\[ray\]'"):
        LLM(**TINY, **RANKS)


UNREACHABLE = "='ray': RAY_ADDRESS=10.0.0.1:6379: Could not find any running Ray instance"


def not_found(**_: Any) -> None:
    raise ConnectionError("Could not find any running Ray instance.")


def test_a_cluster_that_cannot_be_reached_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=not_found))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ValueError, match=f"distributed_executor_backend{UNREACHABLE}"):
        LLM(**TINY, **RANKS)


def test_replicas_on_a_cluster_that_cannot_be_reached_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", not_found)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ValueError, match=f"data_parallel_backend{UNREACHABLE}"):
        AsyncLLM(**TINY, data_parallel_size=2, data_parallel_backend="ray")
