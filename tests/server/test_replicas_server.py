"""Several engines behind one port: the answers of one, a state for each, and the end of one costs its own requests."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from holding import LIMIT_S, until
from prometheus_client.parser import text_string_to_metric_families
from serving import LONG_BODY, NO_TLS, Served, error_of, serving

from paged_infer import LLM, AsyncLLM, SamplingParams
from paged_infer.async_llm import EngineDeadError
from paged_infer.server.run import opening_lines

NUM = 2


@pytest.fixture(scope="module")
def replicas() -> Iterator[Served]:
    """One server for all tests."""
    options = {"data_parallel_size": NUM, "data_parallel_routing": "round_robin"}
    with serving(max_num_seqs=16, num_blocks=512, max_model_len=192, **options) as served:
        yield served


def per_replica(served: Served, name: str) -> list[float]:
    families = text_string_to_metric_families(served.http.get("/metrics").text)
    values = {s.labels["engine"]: s.value for family in families for s in family.samples if s.name == name}
    return [values[str(index)] for index in range(NUM)]


def test_the_openai_client_gets_the_answers_of_one_engine(replicas: Served, storyteller: LLM) -> None:
    beginnings = ["Once upon a time", "Mia had a red key", "The river was wide"]
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=20)
    expected = [one.outputs[0].text for one in storyteller.generate(beginnings, params, use_tqdm=False)]
    client = replicas.openai()
    for prompt, text in zip(beginnings, expected, strict=True):
        ask = {"model": "storyteller", "prompt": prompt, "temperature": 0.8, "seed": 5, "max_tokens": 20}
        assert client.completions.create(**ask).choices[0].text == text
        pieces = client.completions.create(**ask, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == text
    replicas.check_idle()
    assert per_replica(replicas, "vllm:time_to_first_token_seconds_count") == [NUM * 3 / 2] * NUM, "they took turns"
    tokens = per_replica(replicas, "vllm:generation_tokens_total")
    assert tokens[0] == tokens[1] > 0  # each answer once as a whole, once streamed


def test_the_opening_lines_name_the_replicas(replicas: Served) -> None:
    assert opening_lines(replicas.engine, replicas.server.service, [replicas.socket]) == [
        f"API:   {replicas.url}/v1",
        f"Page:  {replicas.url}/",
        "Model: storyteller, up to 192 tokens",
        "Pool:  512 blocks of 16 tokens, in each of 2 replicas",
    ]


def test_health_and_events_are_those_of_each(replicas: Served) -> None:
    health = replicas.http.get("/health").json()
    assert health["replicas"] == [{"replica": i, "status": "ready", "restarts": 0} for i in range(NUM)]
    assert per_replica(replicas, "paged_infer:replica_ready") == [1, 1]
    assert per_replica(replicas, "vllm:kv_cache_usage_perc") == [0, 0]
    assert {f'engine="{i}"' in replicas.http.get("/metrics").text for i in range(NUM)} == {True}
    for replica in range(NUM):
        with replicas.http.stream("GET", f"/events?replica={replica}") as response:
            lines = filter(None, response.iter_lines())
            assert '"num_blocks":512' in next(lines)
            for _ in range(NUM):  # they take turns
                replicas.complete(prompt="Once", max_tokens=2)
            seen = json.loads(next(lines).removeprefix("data: "))
            assert [event for record in seen["records"] for event in record["events"] if event[0] == "arrive"]
    assert "from 0 to 1" in error_of(replicas.http.get("/events?replica=2"), 400)["message"]


def test_a_client_that_leaves_frees_its_blocks_wherever_they_are(replicas: Served) -> None:
    for _ in range(NUM):
        body = {**LONG_BODY, **LONG_BODY["extra_body"], "max_tokens": 150, "stream": True}
        del body["extra_body"]
        with replicas.http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
    replicas.check_idle()


def test_of_five_hundred_requests_a_killed_replica_loses_its_own_and_no_other(
    replicas: Served, storyteller: LLM
) -> None:
    engine, num = replicas.engine, 500
    beginnings = ["Once upon a time", "Mia had a red key", "The river was wide", "One morning, Tom"]
    prompts = [f"{beginnings[i % 4]}{' and' * (i % 5)}" for i in range(num)]
    params = [
        SamplingParams(temperature=(i % 3) / 2, seed=i, max_tokens=4 + i % 5 if i < num - 20 else 100, ignore_eos=True)
        for i in range(num)
    ]
    expected = storyteller.generate(prompts, params, use_tqdm=False)
    victim = engine._core._replicas[1].process.process  # type: ignore[union-attr]
    killed: list[int] = []
    first = engine._core._router._last ^ 1  # type: ignore[union-attr]  # who gets request 0; they take turns

    async def one(i: int, stream: Any) -> list[int] | None:
        """Its tokens; None if it failed. The first that the victim finishes is also the last: it is killed then."""
        try:
            last = [output async for output in stream][-1]
        except EngineDeadError as error:
            assert str(error) == "replica 1 has ended: killed by SIGKILL"
            return None
        if (first + i) % NUM == 1 and not killed:
            killed.append(victim.pid)
            victim.kill()
        return last.outputs[0].token_ids

    async def main() -> list[list[int] | None]:
        streams = [await engine.submit(*pair, f"r{i}") for i, pair in enumerate(zip(prompts, params, strict=True))]
        return await asyncio.gather(*(one(i, stream) for i, stream in enumerate(streams)))

    answers = asyncio.run(main())
    failed = {i for i, answer in enumerate(answers) if answer is None}
    assert failed and all((first + i) % NUM == 1 for i in failed)
    errors = replicas.http.get("/metrics").text.partition('engine="1",finished_reason="error"')[2].split()
    assert float(errors[1]) == len(failed), errors[:2]
    assert failed >= {i for i in range(num - 20, num) if (first + i) % NUM == 1}, "these take much longer"
    for answer, output in zip(answers, expected, strict=True):
        assert answer is None or answer == output.outputs[0].token_ids

    until(lambda: {one["status"] for one in engine.health()} == {"ready"}, engine.health)
    assert [one["restarts"] for one in replicas.http.get("/health").json()["replicas"]] == [0, 1]
    again = [replicas.complete(prompt=prompts[0], temperature=0, max_tokens=4, ignore_eos=True) for _ in range(NUM)]
    assert again[0]["choices"][0]["text"] == again[1]["choices"][0]["text"] == expected[0].outputs[0].text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_parallel_size": 0}, "data_parallel_size=0: must be an integer >= 1"),
        ({"data_parallel_routing": "prefix"}, "with data_parallel_size=1: one engine"),
        ({"data_parallel_routing": "random"}, "data_parallel_routing='random': must be one of round_robin"),
        (
            {"data_parallel_size": 2, "data_parallel_routing": "prefix", "enable_prefix_caching": False},
            "no prefix would be found",
        ),
        ({"engine_process": True, "trace": True}, "the trace would stay in the engine's process"),
    ],
)
def test_options_that_cannot_be_are_refused_before_a_process_starts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AsyncLLM(device="cpu", **options)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_ctrl_c_lets_the_running_request_finish_and_leaves_no_process_behind() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = ["--port", str(port), "--num-blocks", "128", "--device", "cpu", "--data-parallel-size", str(NUM)]
    process = subprocess.Popen(
        [sys.executable, "-m", "paged_infer.cli", "serve", *options, "--shutdown-timeout", str(100 * LIMIT_S)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # a group of its own, as a terminal's foreground job
    )
    try:
        assert process.stderr is not None
        while "Application startup complete" not in (line := process.stderr.readline()):
            assert line, "the server has ended"
        children = children_of(process.pid)
        assert len(children) >= NUM  # and multiprocessing's own
        body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=LIMIT_S, **NO_TLS) as response:
            lines = response.iter_lines()
            next(lines)
            os.killpg(process.pid, signal.SIGINT)  # to all of them, as a terminal does
            *_, last = (line for line in lines if line)
        assert last == "data: [DONE]"
        _, errors = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0 and "Traceback" not in errors and "leaked" not in errors, errors
        until(lambda: not any(map(is_alive, children)))
    finally:
        process.kill()
        process.communicate()
