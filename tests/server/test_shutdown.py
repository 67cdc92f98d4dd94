"""Shutdown: running requests may finish, within a limit; every request is answered; the process exits cleanly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from holding import LIMIT_S, until
from serving import NO_TLS, Served

from paged_infer.server.service import Settings

LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}


LONG_WAIT_S = 100 * LIMIT_S  # of the server: a test that waits for it fails


def test_what_runs_may_finish_while_newcomers_are_sent_away() -> None:
    served = Served(Settings(), shutdown_timeout_s=LONG_WAIT_S, num_blocks=128)
    with served.held() as steps:
        answer = served.begin(**{**LONG, "max_tokens": 150})
        served.until_queued(waiting=1)
        steps.run(1)
        served.server.stop()
        refused = served.post("/v1/completions", prompt="x")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "service_unavailable"
        assert served.http.get("/health").status_code == 503
    received = answer.result(LIMIT_S)
    assert received.status_code == 200 and received.json()["usage"]["completion_tokens"] == 150
    served.stop()


@pytest.mark.parametrize("stream", [False, True])
def test_what_takes_too_long_is_ended_and_told_so(stream: bool) -> None:
    served = Served(Settings(), shutdown_timeout_s=0.1, num_blocks=128)
    with served.held() as steps:
        answer = served.begin(**LONG, stream=stream)
        served.until_queued(waiting=1)
        steps.run(1)
        served.stop()
    received = answer.result(LIMIT_S)
    if stream:
        events = [line.removeprefix("data: ") for line in received.text.split("\n\n") if line]
        assert events[-1] == "[DONE]" and "shutting down" in json.loads(events[-2])["error"]["message"]
    else:
        assert received.status_code == 503 and "shutting down" in received.json()["error"]["message"]
    assert served.is_idle()


def test_half_a_body_is_not_waited_for() -> None:
    settings = Settings(receive_timeout_s=LONG_WAIT_S)
    served = Served(settings, shutdown_timeout_s=LONG_WAIT_S, num_blocks=128)
    with socket.create_connection(("127.0.0.1", served.port), timeout=LIMIT_S) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        until(lambda: served.server.server_state.tasks)
        served.stop()
        assert raw.recv(100).startswith(b"HTTP/1.1 503")


def test_a_second_signal_does_not_wait() -> None:
    served = Served(Settings(), shutdown_timeout_s=LONG_WAIT_S, num_blocks=128)
    with served.held() as steps:
        answer = served.begin(**LONG)
        served.until_queued(waiting=1)
        steps.run(1)
        served.server.stop()
        served.stop()
    assert answer.result(LIMIT_S).status_code == 503


NUM_CLIENTS = 24
# The engine takes one step when all clients have come, and no other.
HELD = f"""
from paged_infer.cli import app
from paged_infer.engine.engine import LLMEngine
from paged_infer.engine.request_states import StepReport

run_step = LLMEngine.step

def step(self, sleep):
    stats = self.stats()
    if stats["num_waiting"] == {NUM_CLIENTS}:
        return run_step(self, sleep)
    sleep({LIMIT_S})
    return StepReport()

LLMEngine.step = step
app()
"""


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=LIMIT_S, **NO_TLS).status_code == 200
    except httpx.ConnectError:
        return False


def num_running(url: str) -> float:
    return metric(url, "vllm:num_requests_running")


def num_waiting(url: str) -> float:
    return metric(url, "vllm:num_requests_waiting")


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=LIMIT_S, **NO_TLS).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


@contextmanager
def command(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The real command in a process of its own, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--port", str(port), "--num-blocks", "256", "--device", "cpu", *arguments]
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, "serve", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PAGED_INFER_API_KEY": "k"},
    )
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: process.poll() is not None or is_healthy(url))
        assert process.poll() is None
        yield process, url
    finally:
        process.kill()
        process.communicate()


def test_a_second_signal_ends_the_command_with_status_1() -> None:
    with command("--shutdown-timeout", str(LONG_WAIT_S), "--log-level", "warning") as (process, url):
        client = httpx.Client(base_url=url, headers={"Authorization": "Bearer k"}, timeout=LIMIT_S, **NO_TLS)
        with client, ThreadPoolExecutor() as pool:
            answer = pool.submit(client.post, "/v1/completions", json=LONG)
            until(lambda: num_waiting(url) == 1)
            process.send_signal(signal.SIGTERM)
            until(lambda: not is_healthy(url))
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=LIMIT_S)
            assert answer.result(LIMIT_S).status_code == 503
        assert process.returncode == 1 and "Traceback" not in errors, errors
        assert "INFO" not in errors and "Page:" not in errors, "its log level is warning"


def test_sigterm_under_load_ends_the_command_cleanly() -> None:
    with command("--shutdown-timeout", "0.3") as (process, url):
        headers = {"Authorization": "Bearer k"}
        statuses: list[int] = []
        ends: list[str] = []

        def load(i: int) -> None:
            with httpx.Client(base_url=url, headers=headers, timeout=LIMIT_S, **NO_TLS) as client:
                if i % 2:
                    with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
                        ends.append([line for line in response.iter_lines() if line][-1])
                else:
                    statuses.append(client.post("/v1/completions", json=LONG).status_code)

        threads = [threading.Thread(target=load, args=(i,)) for i in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        until(lambda: num_running(url) == NUM_CLIENTS)
        models = httpx.get(f"{url}/v1/models", timeout=LIMIT_S, **NO_TLS)
        assert models.status_code == 401  # the key came through the environment
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=LIMIT_S)
        for thread in threads:
            thread.join(LIMIT_S)
        assert process.returncode == 0, errors
        lines = [line.removeprefix("INFO:").strip() for line in errors.splitlines()]
        first = lines.index(f"API:   {url}/v1")
        assert lines[first + 1 : first + 4] == [
            f"Page:  {url}/",
            "Model: storyteller, up to 1,024 tokens",
            "Pool:  256 blocks of 16 tokens",
        ]
        assert not [line for line in lines[:first] if "request" in line.lower()], "before the first request"
        assert "Traceback" not in errors and "leaked" not in errors, errors
        assert statuses == [503] * (NUM_CLIENTS // 2)
        assert ends == ["data: [DONE]"] * (NUM_CLIENTS // 2)
