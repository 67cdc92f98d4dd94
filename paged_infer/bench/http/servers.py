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
HOST = "127.0.0.1"


@contextmanager
def running(module: str, *arguments: str, torch_threads: int) -> Iterator[str]:
    """``python -m MODULE ARGUMENTS --port P`` until /health responds; yields its address.

    Raises:
        ValueError: it ended before that; the message has the last line of its log.
    """
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", module, *arguments, "--host", HOST, "--port", str(port)]
    url = f"http://{HOST}:{port}"
    with tempfile.TemporaryFile() as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch_threads)}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            if not _answers(url, process):
                log.seek(0)
                words = log.read().decode(errors="replace").strip().splitlines() or ["no message"]
                raise ValueError(f"{module} did not start: {words[-1]}")
            yield url
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
            return httpx.get(f"{url}/health", timeout=START_S).status_code == 200
        except httpx.TransportError:
            time.sleep(POLL_S)
    return False


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
