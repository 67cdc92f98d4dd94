"""``paged-infer serve``: what it needs is asked for only when it is called, and bad input is one line."""

from __future__ import annotations

import dataclasses
import inspect
import socket
import subprocess
import sys

import pytest
from holding import LIMIT_S
from serving import Served
from typer.testing import CliRunner

from paged_infer.cli import app
from paged_infer.config import EngineConfig
from paged_infer.server.cli import serve
from paged_infer.server.run import listen, opening_lines

NAMES = ["fastapi", "uvicorn", "prometheus_client"]
# One process for both tests, since most of its seconds go into imports. One that has failed is tried again.
WITHOUT_THE_EXTRA = f"""
import sys
sys.modules.update(dict.fromkeys({[*NAMES, "starlette", "pydantic"]!r}))
import paged_infer
from paged_infer.cli import app
paged_infer.AsyncLLM
print('fine')
for name in {["starlette", "pydantic", *NAMES]!r}:
    del sys.modules[name]
for name in {NAMES!r}:
    sys.modules[name] = None
    try:
        app(['serve'])
    except SystemExit as end:
        print(end.code)
    del sys.modules[name]
"""


@pytest.fixture(scope="module")
def without_the_extra() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_THE_EXTRA]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def test_the_package_and_its_other_commands_do_without_the_extra(without_the_extra) -> None:
    assert without_the_extra.stdout.startswith("fine\n"), without_the_extra.stderr


def test_without_the_extra_one_line_says_what_to_install(without_the_extra) -> None:
    assert without_the_extra.stdout.splitlines()[1:] == ["2"] * len(NAMES)
    assert without_the_extra.stderr.splitlines() == [
        f"error: serve needs {name}: pip install 'paged-infer[serve]'" for name in NAMES
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no/such-model",), "no/such-model"),
        (("--block-size", "0"), "block_size=0"),
        (("--max-num-waiting", "0"), "max_num_waiting=0"),
        (("--max-body-bytes", "0"), "max_body_bytes=0"),
        (("--receive-timeout", "0"), "receive_timeout_s=0"),
        (("--max-num-logprobs", "0"), "max_num_logprobs=0"),
        (("--api-key", ""), "api_key"),
        (("--log-level", "loud"), "log_level='loud'"),
        (("--step-timeout", "-1"), "step_timeout=-1.0: must be a finite number of seconds, or 0 for no limit"),
        (("--step-timeout", "inf"), "step_timeout=inf"),
        (("--swap-space", "1"), "swap_space=1"),
        (("--enable-auto-tool-choice",), "enable_auto_tool_choice=True: needs tool_call_parser"),
        (("--tool-call-parser", "hermes"), "tool_call_parser='hermes': needs enable_auto_tool_choice"),
        (
            ("--enable-auto-tool-choice", "--tool-call-parser", "x"),
            "tool_call_parser='x': must be one of hermes, llama3",
        ),
        (("--reasoning-parser", "x"), "reasoning_parser='x'"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, ["serve", "--port", str(free_port()), *arguments])
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output
    assert result.output.strip().count("\n") == 0


def test_every_option_of_the_engine_is_one_of_the_command() -> None:
    parameters = set(inspect.signature(serve).parameters)
    assert {field.name for field in dataclasses.fields(EngineConfig)} <= parameters


def test_a_port_in_use_is_told_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paged_infer.async_llm.AsyncLLM", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", "--port", str(port)])
    assert (result.exit_code, result.output) == (
        2,
        f"error: cannot listen on 127.0.0.1:{port}: Address already in use\n",
    )


def test_connections_send_small_pieces_at_once() -> None:
    """Else the first event of a stream waits 40 ms, for the client to acknowledge the headers."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("host", "url", "more"),
    [
        ("127.0.0.1", "http://127.0.0.1", ""),
        ("0.0.0.0", "http://127.0.0.1", ", and every other address of this machine"),
        ("::1", "http://[::1]", ""),
    ],
)
def test_the_opening_lines_have_an_address_that_a_browser_here_can_open(served: Served, host, url, more) -> None:
    with listen(host, 0) as listener:
        api, page, *_ = opening_lines(served.engine, served.server.service, [listener])
        port = listener.getsockname()[1]
    assert (api, page) == (f"API:   {url}:{port}/v1{more}", f"Page:  {url}:{port}/")
