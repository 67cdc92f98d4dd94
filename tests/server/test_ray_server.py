"""Replicas on a Ray cluster of two nodes, which are two raylets on this machine. Skipped without ray."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from holding import until
from serving import Served, serving

from paged_infer import LLM, SamplingParams
from paged_infer.engine.engine import LLMEngine

ray = pytest.importorskip("ray")
NUM = 2


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """Each has one CPU, so each takes one replica. Their processes can import what is in this file."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for folder in Path(__file__).parents[:2]:
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def replicas(two_nodes: Any) -> Iterator[Served]:
    options = {"data_parallel_size": NUM, "data_parallel_backend": "ray", "data_parallel_routing": "round_robin"}
    with serving(max_num_seqs=16, num_blocks=512, max_model_len=192, **options) as served:
        yield served


def node_of(_: LLMEngine) -> str:
    return ray.get_runtime_context().get_node_id()


def answers(replicas: Served) -> list[str]:
    """Of each replica, as they take turns."""
    client = replicas.openai()
    ask: dict[str, Any] = {"model": "storyteller", "temperature": 0.8, "seed": 5, "max_tokens": 20}
    return [client.completions.create(prompt="Once upon a time", **ask).choices[0].text for _ in range(NUM)]


def test_a_cluster_of_two_nodes_gives_the_answers_of_one_engine(replicas: Served, storyteller: LLM) -> None:
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=20)
    (expected,) = storyteller.generate("Once upon a time", params, use_tqdm=False)
    assert answers(replicas) == [expected.outputs[0].text] * NUM
    nodes = [asyncio.run(replicas.engine.run(node_of, replica)) for replica in range(NUM)]
    assert len(set(nodes)) == NUM
    last = asyncio.run(end_of(replicas))
    assert 0 < last.metrics.ttft <= last.metrics.latency < 1000, "times of another node are on our clock"
    replicas.check_idle()


async def end_of(replicas: Served) -> Any:
    return [output async for output in replicas.engine.generate("Once", SamplingParams(max_tokens=3))][-1]


def test_an_actor_that_is_killed_is_replaced(replicas: Served) -> None:
    before = answers(replicas)
    replicas.engine._core._replicas[1].process.process.kill()  # type: ignore[union-attr]
    health = replicas.engine.health
    until(lambda: health()[1] == {"replica": 1, "status": "ready", "restarts": 1}, health)
    assert answers(replicas) == before
