"""More connections than there are file descriptors: those beyond are refused, and logged once."""

from __future__ import annotations

import os
import resource
import signal
import socket
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from serving import serving
from test_shutdown import command

from paged_infer.server import run
from paged_infer.server.service import Settings


def status_on(raw: socket.socket) -> int:
    """Of one request for /health. What is refused may be closed before it can be sent."""
    with suppress(OSError):
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return int(raw.recv(1000).split()[1])


def test_connections_beyond_the_file_descriptors_are_a_503_and_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Any] = []
    monkeypatch.setattr(run, "FULL_EVERY_S", 1e9)
    monkeypatch.setattr(run.logger, "warning", lambda *arguments: lines.append(arguments))
    with serving(Settings(receive_timeout_s=600.0), num_blocks=32) as served:  # none is closed meanwhile
        assert served.http.get("/health").status_code == 200
        with open(os.devnull) as lowest_free:
            limit = lowest_free.fileno() + 20
        monkeypatch.setattr(run, "most_files", lambda: limit)
        with ExitStack() as stack:
            statuses: list[int] = []
            while statuses[-3:] != [503] * 3:
                raw = stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=60))
                statuses.append(status_on(raw))
            assert statuses == sorted(statuses) and set(statuses) == {200, 503} and len(lines) == 1
            assert served.http.get("/health").status_code == 200  # on a connection that is open already
        until_served(served.port)


def until_served(port: int) -> None:
    """The server has to notice first that connections were closed."""
    while True:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as raw:
            if status_on(raw) == 200:
                return


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_three_hundred_connections_to_a_server_of_128_files_hardly_fill_its_log() -> None:
    with command("--log-level", "warning") as (process, url):
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (128, 128))
        port = int(url.rsplit(":", 1)[1])
        with ExitStack() as stack:
            address = ("127.0.0.1", port)
            several = [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(300)]
            statuses = [status_on(raw) for raw in several]
            assert set(statuses) == {200, 503}
        until_served(port)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert "file descriptors" in errors and len(errors) < 1000, errors[:3000]  # a line a minute


def test_a_server_may_open_as_many_files_as_the_system_lets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[Any] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: set_to.append(limits))
    run.raise_file_limit()
    assert set_to == [(4096, 4096)]
    assert run.most_files() == 1024 - run.RESERVED_FILES
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert run.most_files() == float("inf")
