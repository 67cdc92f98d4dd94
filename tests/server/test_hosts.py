"""Allowed hosts, allowed origins (CORS), and HEAD wherever there is GET."""

from __future__ import annotations

import re
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from serving import PROMPT, Served, error_of, serving
from test_serve_cli import free_port
from typer.testing import CliRunner

from paged_infer.cli import app
from paged_infer.server import run
from paged_infer.server.hosts import LOOPBACK, host_name, is_allowed, names_of
from paged_infer.server.service import Settings

PAGE = "http://localhost:3000"


@pytest.mark.parametrize("path", ["/", "/health", "/events", "/v1/models", "/metrics", "/result/x"])
def test_a_host_that_is_not_served_is_refused_whatever_it_asks_for(path: str) -> None:
    with serving(Settings(allowed_hosts=LOOPBACK), num_blocks=32) as served:
        for host in ("evil.example", "127.0.0.1.evil.example:80", f"localhost.evil:{served.port}", "[::2]"):
            error = error_of(served.http.get(path, headers={"Host": host}), 400)
            assert error["code"] == "host_not_allowed" and "--allowed-hosts" in error["message"]


def test_the_names_of_this_machine_are_served_with_and_without_a_port() -> None:
    with serving(Settings(allowed_hosts=LOOPBACK), num_blocks=32) as served:
        for host in ("localhost", "127.0.0.1", "LOCALHOST:8000", "[::1]:9", "[::1]", "localhost."):
            assert served.http.get("/health", headers={"Host": host}).status_code == 200
        error_of(served.http.post("/v1/completions", json=PROMPT, headers={"Host": "evil"}), 400)


def test_an_application_by_itself_serves_every_host(served: Served) -> None:
    assert served.http.get("/health", headers={"Host": "any.example"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "address", "served", "refused"),
    [
        ("127.0.0.1", "127.0.0.1", ["localhost:1", "127.0.0.1", "[::1]"], ["10.0.0.1", "box"]),
        ("Box", "10.0.0.1", ["localhost", "10.0.0.1:80", "BOX:80"], ["10.0.0.2", "box.evil"]),
        ("0.0.0.0", "0.0.0.0", ["anything"], []),
        ("::", "::", ["anything", "[fe80::1]:8000"], []),
        ("", "0.0.0.0", ["anything"], []),
        ("fe80::1", "fe80::1", ["[fe80::1]:8000", "localhost"], ["[fe80::2]"]),
    ],
)
def test_a_server_is_called_by_loopback_names_and_what_it_is_bound_to(
    host: str, address: str, served: list[str], refused: list[str]
) -> None:
    names = names_of(host, address)
    assert all(is_allowed(one, names) for one in served)
    assert not any(is_allowed(one, names) for one in refused)


def test_a_pattern_allows_what_is_below_a_domain() -> None:
    assert is_allowed("a.b.example:80", ["*.example"]) and not is_allowed("example", ["*.example"])
    assert not is_allowed("badexample", ["*.example"])
    assert host_name("[::1]:80") == host_name("::1") == "::1"


@pytest.mark.parametrize(
    ("options", "hosts", "origins"),
    [
        ((), LOOPBACK, ()),
        (("--host", "0.0.0.0"), ("*",), ()),
        (("--allowed-hosts", "a", "--allowed-hosts", "*.b"), ("a", "*.b"), ()),
        (("--allowed-origins", PAGE, "--allowed-origins", "http://b"), None, (PAGE, "http://b")),
        (("--allowed-origins", '["*"]'), None, ("*",)),  # as vLLM takes it
    ],
)
def test_the_command_serves_the_hosts_and_origins_that_it_is_given(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], hosts: tuple[str, ...] | None, origins: tuple[str, ...]
) -> None:
    served: list[Any] = []
    engine = SimpleNamespace(is_abandoned=False)
    monkeypatch.setattr("paged_infer.async_llm.AsyncLLM", lambda *_, **options: engine)
    monkeypatch.setattr(run, "serve", lambda *arguments, **options: served.append(arguments) or True)
    result = CliRunner().invoke(app, ["serve", "--port", str(free_port()), *options])
    assert result.exit_code == 0, result.output
    ((_, settings, listener),) = served
    listener.close()
    assert settings.allowed_hosts == (hosts or LOOPBACK)
    assert settings.allowed_origins == origins


@pytest.mark.parametrize("value", ["[1]", "[", '["http://a", 5]'])
def test_origins_that_are_no_list_of_strings_are_one_line(value: str) -> None:
    result = CliRunner().invoke(app, ["serve", "--port", str(free_port()), "--allowed-origins", value])
    assert result.exit_code == 2 and "--allowed-origins" in result.output
    assert result.output.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("allowed_hosts", "http://a"),
        ("allowed_hosts", "a.*"),
        ("allowed_hosts", ""),
        ("allowed_hosts", "*."),
        ("allowed_hosts", "*a.example"),
        ("allowed_hosts", "[a, b]"),
        ("allowed_hosts", "a,b"),
        ("allowed_hosts", "a:port"),
        ("allowed_origins", "localhost:3000"),
        ("allowed_origins", "http://localhost:3000/"),
    ],
)
def test_what_is_no_host_or_origin_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        Settings(**{name: (value,)})  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["*", "*.a.example", "A.example:80", "my_host", "::1", "[::1]:80", "fe80::1%eth0"])
def test_what_is_a_host_is_taken(host: str) -> None:
    assert Settings(allowed_hosts=(host,)).allowed_hosts == (host,)


def test_pages_of_allowed_origins_may_call_the_server_and_others_may_not() -> None:
    with serving(Settings(allowed_origins=(PAGE,), api_key="k"), num_blocks=32) as served:
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        preflight = served.http.options("/v1/completions", headers={"Origin": PAGE, **asks})
        assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == PAGE
        assert preflight.headers["access-control-allow-headers"] == "authorization"
        key = {"Authorization": "Bearer k"}
        answer = served.http.post("/v1/completions", json=PROMPT, headers={"Origin": PAGE, **key})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
        refused = served.http.post("/v1/completions", json=PROMPT, headers={"Origin": PAGE})
        assert error_of(refused, 401) and refused.headers["access-control-allow-origin"] == PAGE
        other = served.http.get("/v1/models", headers={"Origin": "http://evil.example", **key})
        assert "access-control-allow-origin" not in other.headers


def test_without_an_origin_allowed_no_page_of_another_site_may_read(served: Served) -> None:
    assert "access-control-allow-origin" not in served.http.get("/health", headers={"Origin": PAGE}).headers


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/v1/models/storyteller", "/openapi.json"])
def test_head_is_get_without_its_body(served: Served, path: str) -> None:
    whole, head = served.http.get(path), served.http.head(path)
    assert (head.status_code, head.content) == (200, b"") and whole.content
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert path == "/metrics" or head.headers["content-length"] == whole.headers["content-length"]


def test_head_of_what_is_not_there_has_the_same_status(served: Served) -> None:
    statuses = {path: served.http.head(path).status_code for path in ("/result/x", "/nothing", "/v1/completions")}
    assert statuses == {"/result/x": 404, "/nothing": 404, "/v1/completions": 405}


def test_head_of_the_events_ends_and_the_connection_goes_on(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as raw:
        for path in ("/events", "/health"):
            raw.sendall(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += raw.recv(1000)
            assert head.startswith(b"HTTP/1.1 200") and head.count(b"\r\n\r\n") == 1
