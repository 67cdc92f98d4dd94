"""``paged-infer serve``: what it needs is asked for only when it is called, and bad input is one line."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from paged_infer.cli import app
from paged_infer.server.run import listen

BLOCKED = "import sys; sys.modules.update(dict.fromkeys({names!r}))\n"


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def test_the_package_and_its_other_commands_do_without_the_extra() -> None:
    script = BLOCKED.format(names=["fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic"])
    done = python(f"{script}import paged_infer, paged_infer.cli; paged_infer.AsyncLLM; print('fine')")
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_without_the_extra_one_line_says_what_to_install() -> None:
    names = ["fastapi", "uvicorn", "prometheus_client"]
    script = (
        "import sys\n"
        "from paged_infer.cli import app\n"
        f"for name in {names!r}:\n"  # in one process: an import that has failed is tried again
        "    sys.modules[name] = None\n"
        "    try:\n"
        "        app(['serve'])\n"
        "    except SystemExit as end:\n"
        "        print(end.code)\n"
        "    del sys.modules[name]\n"
    )
    done = python(script)
    assert done.stdout == "2\n" * len(names), done.stderr
    assert done.stderr.splitlines() == [
        f"error: serve needs {name}: pip install 'paged-infer[serve]'" for name in names
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no/such-model",), "no/such-model"),
        (("--block-size", "0"), "block_size=0"),
        (("--max-num-waiting", "0"), "max_num_waiting=0"),
        (("--max-body-bytes", "0"), "max_body_bytes=0"),
        (("--api-key", ""), "api_key"),
        (("--log-level", "loud"), "log_level='loud'"),
        (("--swap-space", "1"), "swap_space=1"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, ["serve", "--port", str(free_port()), *arguments])
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output
    assert result.output.strip().count("\n") == 0


def test_a_port_in_use_is_told_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paged_infer.async_engine.AsyncLLM", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", "--port", str(port)])
    assert (result.exit_code, result.output) == (
        2,
        f"error: cannot listen on 127.0.0.1:{port}: Address already in use\n",
    )


def test_connections_send_small_pieces_at_once() -> None:
    """Else the first event of a stream waits 40 ms, for the client to acknowledge the headers."""
    with listen("127.0.0.1", 0) as door, socket.create_connection(door.getsockname()):
        connection, _ = door.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
