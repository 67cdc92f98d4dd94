"""The real command, in the middle of a step that never returns: it still ends, on signals and by itself."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import pytest
from serving import NO_TLS

HANGS = """
import sys, threading
from paged_infer.execution.model_runner import ModelRunner

def launch(self, step):
    print("the step hangs", file=sys.stderr, flush=True)
    threading.Event().wait()

ModelRunner.launch = launch
from paged_infer.cli import app
app()
"""


@contextlib.contextmanager
def hung_server(*options: str) -> Iterator[tuple[subprocess.Popen[str], list[httpx.Response], threading.Thread]]:
    """A server whose first step hangs, the answer to the request that began it, and the thread that waits for it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, "serve", "--port", str(port), "--num-blocks", "64", "--device", "cpu", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    answers: list[httpx.Response] = []

    def ask() -> None:
        transport = httpx.HTTPTransport(retries=0, **NO_TLS)
        with httpx.Client(transport=transport, timeout=300) as client:
            body = {"prompt": "Once", "max_tokens": 4}
            answers.append(client.post(f"http://127.0.0.1:{port}/v1/completions", json=body))

    try:
        assert process.stderr is not None
        while "Application startup complete" not in (line := process.stderr.readline()):
            assert line, "the server has ended"
        asking = threading.Thread(target=ask)
        asking.start()
        while "the step hangs" not in (line := process.stderr.readline()):
            assert line, "the server has ended"
        yield process, answers, asking
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGINT]])
def test_a_server_ends_on_a_signal_though_a_step_never_returns(signals: list[int]) -> None:
    limit = ("--shutdown-timeout", "0.1" if len(signals) == 1 else "1000000")
    with hung_server(*limit) as (process, answers, asking):
        for number in signals:
            process.send_signal(number)
            if number != signals[-1]:  # two that come together may count as one
                assert process.stderr is not None
                while "Shutting down" not in (line := process.stderr.readline()):
                    assert line, "the server has ended"
        _, errors = process.communicate(timeout=120)
        asking.join(60)
        assert process.returncode == 1, errors
        assert answers[0].status_code == 503 and "shutting down" in answers[0].json()["error"]["message"]
        assert "Traceback" not in errors, errors


def test_a_server_whose_step_takes_too_long_answers_and_ends() -> None:
    with hung_server("--step-timeout", "0.2") as (process, answers, asking):
        _, errors = process.communicate(timeout=120)
        asking.join(60)
        assert process.returncode == 1 and "step_timeout=0.2" in errors
        assert answers[0].status_code == 500 and answers[0].json()["error"]["code"] == "engine_dead"
