"""The end of a server: what runs may finish, within a limit; nobody is left waiting; the process goes cleanly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from serving import NO_TLS, Served

from paged_infer.server.service import Settings

LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}


def in_background(url: str, body: dict[str, Any]) -> tuple[threading.Thread, list[httpx.Response]]:
    said: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: said.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60, **NO_TLS))
    )
    thread.start()
    return thread, said


def until_running(served: Served, num: int = 1) -> None:
    while served.engine.stats()["num_running"] < num:
        time.sleep(0.002)


def test_what_runs_may_finish_while_newcomers_are_sent_away() -> None:
    served = Served(Settings(), shutdown_timeout_s=20.0, num_blocks=128)
    thread, said = in_background(served.url, {**LONG, "max_tokens": 150})
    until_running(served)
    served.server.stop()
    refused = served.post("/v1/completions", prompt="x")
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "service_unavailable"
    assert served.http.get("/health").status_code == 503
    thread.join(30)
    assert said[0].status_code == 200 and said[0].json()["usage"]["completion_tokens"] == 150
    served.stop()


@pytest.mark.parametrize("stream", [False, True])
def test_what_takes_too_long_is_ended_and_told_so(stream: bool) -> None:
    served = Served(Settings(), shutdown_timeout_s=0.1, num_blocks=128)
    thread, said = in_background(served.url, {**LONG, "stream": stream})
    until_running(served)
    served.stop()
    thread.join(10)
    if stream:
        events = [line.removeprefix("data: ") for line in said[0].text.split("\n\n") if line]
        assert events[-1] == "[DONE]" and "shutting down" in json.loads(events[-2])["error"]["message"]
    else:
        assert said[0].status_code == 503 and "shutting down" in said[0].json()["error"]["message"]
    assert served.is_idle()


def test_half_a_body_is_not_waited_for() -> None:
    served = Served(Settings(), shutdown_timeout_s=60.0, num_blocks=128)
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        while not served.server.server_state.tasks:
            time.sleep(0.002)
        began = time.monotonic()
        served.stop()
        assert raw.recv(100).startswith(b"HTTP/1.1 503") and time.monotonic() - began < 5


def test_a_second_signal_does_not_wait() -> None:
    served = Served(Settings(), shutdown_timeout_s=60.0, num_blocks=128)
    thread, said = in_background(served.url, LONG)
    until_running(served)
    served.server.stop()
    began = time.monotonic()
    served.stop()
    thread.join(10)
    assert time.monotonic() - began < 5 and said[0].status_code == 503


@contextmanager
def command(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The real command in a process of its own, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--port", str(port), "--num-blocks", "256", "--device", "cpu", *arguments]
    process = subprocess.Popen(
        [sys.executable, "-c", "from paged_infer.cli import app; app()", "serve", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PAGED_INFER_API_KEY": "k"},
    )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{url}/health", **NO_TLS).status_code == 200
                break
            except httpx.TransportError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def test_sigterm_under_load_ends_the_command_cleanly() -> None:
    with command("--shutdown-timeout", "0.3") as (process, url):
        headers = {"Authorization": "Bearer k"}
        statuses: list[int] = []
        ends: list[str] = []

        def load(i: int) -> None:
            with httpx.Client(base_url=url, headers=headers, timeout=30, **NO_TLS) as client:
                if i % 2:
                    with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
                        ends.append([line for line in response.iter_lines() if line][-1])
                else:
                    statuses.append(client.post("/v1/completions", json=LONG).status_code)

        threads = [threading.Thread(target=load, args=(i,)) for i in range(24)]
        for thread in threads:
            thread.start()
        while "vllm:num_requests_running{" not in (
            text := httpx.get(f"{url}/metrics", **NO_TLS).text
        ) or not any(
            line.startswith("vllm:num_requests_running") and line.endswith(" 24.0")
            for line in text.splitlines()
        ):
            time.sleep(0.02)
        assert (
            httpx.get(f"{url}/v1/models", **NO_TLS).status_code == 401
        )  # the key came through the environment
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=15)
        for thread in threads:
            thread.join(10)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors and "leaked" not in errors, errors
        assert statuses == [503] * 12 and ends == ["data: [DONE]"] * 12
