"""The real command over two ranks: /metrics counts what they exchange; if one is killed, every client gets an error."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
from rank_pids import children, is_running
from serving import NO_TLS


def test_a_rank_that_is_killed_ends_its_requests_and_the_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--tensor-parallel-size", "2", "--distributed-timeout", "300", "--num-blocks", "512", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "paged_infer.cli", "serve", "--port", str(port), *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stderr is not None
        while "Application startup complete" not in (line := process.stderr.readline()):
            assert line, "the server has ended"
        pids = children(process.pid)
        assert len(pids) == 2
        body = {"prompt": ["Once"] * 4, "max_tokens": 500, "min_tokens": 500, "stream": True}
        errors: list[str] = []
        with httpx.Client(timeout=300, **NO_TLS) as client:
            url = f"http://127.0.0.1:{port}/v1/completions"
            with client.stream("POST", url, json=body) as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith("data: ")
                metrics = client.get(f"http://127.0.0.1:{port}/metrics").text
                sent = re.findall(r"^paged_infer:(all_\w+|collective_bytes)_total\{.*\} (\S+)$", metrics, re.MULTILINE)
                assert len(sent) == 3 and all(float(number) > 0 for _, number in sent), sent
                os.kill(max(pids), signal.SIGKILL)
                errors = [one for one in lines if "error" in one]
        assert len(errors) == 1 and "was ended by SIGKILL" in errors[0], errors
        drained = threading.Thread(target=process.stderr.read)
        drained.start()
        assert process.wait() == 1
        drained.join()
        assert not any(map(is_running, pids))
    finally:
        process.kill()
        process.communicate()
