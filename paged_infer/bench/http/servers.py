"""Servers for ``bench serve``, each in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

START_S, STOP_S, POLL_S = 300.0, 30.0, 0.1
HEALTH_S = 5.0  # until the next try
HOST = "127.0.0.1"


@contextmanager
def running(module: str, *arguments: str, torch_threads: int) -> Iterator[str]:
    """``server_process`` of ``python -m MODULE ARGUMENTS``; yields its address."""
    command = [sys.executable, "-m", module, *arguments]
    with server_process(module, command, OMP_NUM_THREADS=str(torch_threads)) as (url, _):
        yield url


@contextmanager
def server_process(name: str, command: list[str], **environment: str) -> Iterator[tuple[str, int]]:
    """``command --host H --port P`` until /health responds with 200; yields its address and process id.

    Raises:
        ValueError: it ended before that, or took too long; the message has the last line of its log.
    """
    port = _free_port()
    command = [*command, "--host", HOST, "--port", str(port)]
    url = f"http://{HOST}:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
        try:
            if not _answers(url, process):
                log.seek(0)
                words = log.read().decode(errors="replace").strip().splitlines() or ["no message"]
                late = "" if process.poll() is not None else f" within {START_S:.0f} s"
                raise ValueError(f"{name} did not start{late}: {words[-1]}")
            yield url, process.pid
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=HEALTH_S).status_code == 200:
                return process.poll() is None  # else another process responded
        except httpx.TransportError:
            pass
        time.sleep(POLL_S)  # not listening yet, or loading, which is status 503
    return False


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as free:
        return int(free.getsockname()[1])


def served_model(url: str, api_key: str | None) -> str:
    """The first name of the server's model. Raises ValueError where no server responds."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        response = httpx.get(f"{url}/v1/models", headers=headers, timeout=30)
    except (httpx.TransportError, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ValueError(f"base_url={url!r}: {error}") from None
    if response.status_code != 200:
        raise ValueError(f"base_url={url!r}: /v1/models answered {response.status_code}: {response.text[:200]}")
    return str(response.json()["data"][0]["id"])
