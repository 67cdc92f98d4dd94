"""bench peers: what is measured of whom, with systems and a llama.cpp that stand in."""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save_random_checkpoint
from typer.testing import CliRunner

from paged_infer.bench.http import servers
from paged_infer.bench.metrics import Run, TokenTimes
from paged_infer.bench.peers.processes import Others, peak_bytes, watch_others
from paged_infer.bench.side_by_side import turns
from paged_infer.bench.side_by_side.llama_cpp import LlamaOptions, llama_benches, llama_server
from paged_infer.bench.side_by_side.turns import PeersReport, take_turns, workloads
from paged_infer.bench.workloads import Workload, one_request, random_ids
from paged_infer.cli import app

# Responds as the README of llama.cpp's server describes, and keeps the command lines and bodies that it gets.
SERVER = """#!{python}
import json, os, socketserver, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
value = lambda name: sys.argv[sys.argv.index(name) + 1]
mode, folder = os.environ.get("LLAMA", ""), os.path.dirname(__file__)
lock, counts = threading.Lock(), {{"health": 0, "completion": 0}}
with open(folder + "/pids", "a") as file:
    print(os.getpid(), *sys.argv[1:], file=file)
if mode == "broken":
    sys.exit("error loading model: tensor 'x' not found")
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def say(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status); self.send_header("Content-Length", str(len(data))); self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        if self.path == "/health":
            counts["health"] += 1
            if mode == "never" or counts["health"] < 3:
                error = {{"code": 503, "message": "Loading model", "type": "unavailable_error"}}
                return self.say(503, {{"error": error}})
            return self.say(200, {{"status": "ok"}})
        name = "another.gguf" if mode == "another" else value("-m")
        self.say(200, {{"model_path": name, "total_slots": int(value("-np")), "build_info": "b1234-abc"}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with lock:
            counts["completion"] += 1
            open(folder + "/bodies", "a").write(json.dumps(asked) + "\\n")
        if mode == "dies" and counts["completion"] > 1:
            os._exit(1)
        if mode == "full":
            return self.say(400, {{"error": {{"code": 400, "message": "exceeds the available context size",
                                            "type": "exceed_context_size_error"}}}})
        prompt, limit = asked["prompt"], asked["n_predict"]
        cut = prompt[1:] if mode == "cuts" else prompt
        self.say(200, {{"index": 0, "content": "...", "tokens": prompt[:1] * limit, "stop": True, "stop_type": "limit",
                       "tokens_predicted": limit, "tokens_evaluated": len(cut), "truncated": False, "tokens_cached": 9,
                       "timings": {{"prompt_n": len(cut), "predicted_n": limit}}}})
class Server(ThreadingHTTPServer):
    allow_reuse_address, request_queue_size = False, 64
Server((value("--host"), int(value("--port"))), Handler).serve_forever()
"""
BENCH = """#!{python}
print('[ {{"n_prompt": 0, "n_gen": 64, "avg_ns": 640000000, "avg_ts": 100.25, "stddev_ts": 0.5}} ]')
"""
BATCHED = """#!{python}
print('''main: n_kv_max = 8192

|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|    64 |     64 |   32 |   4096 |    1.931 |  1060.59 |    3.644 |   562.02 |    5.575 |   734.71 |
''')
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """On PATH, with llama.cpp's programs."""
    for name, text in (("llama-server", SERVER), ("llama-bench", BENCH), ("llama-batched-bench", BATCHED)):
        (tmp_path / name).write_text(text.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(servers, "POLL_S", 0.01)
    return tmp_path


def options(slots: int = 3) -> LlamaOptions:
    return LlamaOptions(Path("some/model.gguf"), 2, slots, 1501, 256)


def pids_and_words(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "pids").read_text().splitlines()]


def assert_all_have_ended(folder: Path) -> None:
    for pid, *_ in pids_and_words(folder):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_llama_cpp_gets_token_ids_and_as_many_slots_as_there_are_requests(folder: Path) -> None:
    many, alone = random_ids(100, 3, 4, 9, seed=0), one_request(100, 5, 4, seed=0)
    with llama_server(options()) as (system, version):
        runs = system(many), system(alone), system(many)
    assert version == "b1234-abc"
    assert [run.token_ids for run in runs[::2]] == [
        [p[:1] * o.max_tokens for p, o in zip(many.prompts, many.params, strict=True)]
    ] * 2
    assert runs[1].token_ids == [alone.prompts[0][:1] * 4]
    assert all(run.peak_bytes is None or run.peak_bytes > 2**20 for run in runs)
    ((_, *first), (_, *second)) = pids_and_words(folder)
    assert first[:10] == "-m some/model.gguf -t 2 -tb 2 -np 3 -c 1536".split()  # 256 tokens would fill a slot of 256
    assert second[:10] == "-m some/model.gguf -t 2 -tb 2 -np 1 -c 1536".split()
    asked = [json.loads(line) for line in (folder / "bodies").read_text().splitlines()]
    wanted = {"temperature": 0, "ignore_eos": True, "cache_prompt": False, "return_tokens": True}
    assert len(asked) == 7 and all(body.items() >= wanted.items() for body in asked)
    assert_all_have_ended(folder)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("broken", "^llama-server did not start: error loading model: tensor 'x' not found$"),
        ("never", "^llama-server did not start within 0 s: no message$"),
        ("another", "has another.gguf, not model.gguf$"),
        ("dies", "^peer llama.cpp failed: (RemoteProtocolError|ReadError|ConnectError)"),
        ("full", "^peer llama.cpp failed: status 400: .*exceeds the available context size"),
        ("cuts", "^peer llama.cpp failed: it evaluated 4 tokens of a prompt of 5$"),
    ],
)
def test_a_llama_cpp_that_fails_is_one_line_and_leaves_no_process(
    mode: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA", mode)
    if mode == "never":
        monkeypatch.setattr(servers, "START_S", 0.0)
    with pytest.raises(ValueError, match=message), llama_server(options()) as (system, _):
        for _ in range(2):
            system(one_request(100, 5, 4, seed=0))
    if (folder / "pids").exists():  # one that was ended at once may not have written its own
        assert_all_have_ended(folder)


def test_a_port_that_is_taken_is_the_servers_own_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "HEALTH_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(servers, "_free_port", lambda: taken.getsockname()[1])
        with pytest.raises(ValueError, match=r"did not start: .*[Aa]ddress already in use"), llama_server(options()):
            pass
    assert_all_have_ended(folder)


def test_llama_cpps_own_benches_are_read_where_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert llama_benches(options(32), 64, 64) == {
        "llama-bench, one sequence": 100.25,
        "llama-batched-bench, 32 sequences": 562.02,
    }
    (folder / "llama-bench").write_text(f"#!{sys.executable}\nraise SystemExit(1)\n")
    (folder / "llama-batched-bench").unlink()
    assert llama_benches(options(32), 64, 64) == {}
    monkeypatch.setenv("PATH", str(folder / "nowhere"))
    with pytest.raises(ValueError, match="no llama-server is on PATH"), llama_server(options()):
        pass


# -- Turns


def answering(calls: list[str], name: str, first: int = 7, fails_at: int | None = None) -> Any:
    def run(workload: Workload) -> Run:
        calls.append(f"{workload.name}{name}")
        if calls.count(calls[-1]) == fails_at:
            raise ValueError("it broke")
        ids = [[first] * (one.max_tokens or 0) for one in workload.params]
        times = [TokenTimes(0.0, len(p), [], len(i)) for p, i in zip(workload.prompts, ids, strict=True)]
        return Run(ids, times, float(calls.count(calls[-1])), peak_bytes=100 * len(calls))

    return run


def small(*names: str) -> dict[str, Workload]:
    one = one_request(50, 3, 2, seed=0)
    return {name: Workload(name, one.prompts, one.params, 0) for name in names}


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Cores of others during the next runs; 0 after them."""
    cores: list[float] = []

    @contextmanager
    def watch() -> Any:
        yield Others(cores.pop(0) if cores else 0.0)

    monkeypatch.setattr(turns, "watch_others", watch)
    monkeypatch.setattr(turns.time, "sleep", lambda _: None)
    return cores


def test_systems_take_turns_in_both_orders_after_a_run_that_is_not_clocked(beside: list[float]) -> None:
    calls: list[str] = []
    systems = {"x": answering(calls, "x"), "y": answering(calls, "y", first=8)}
    results = take_turns(systems, small("a", "b"), 2)
    assert calls == "ax bx ay by ax ay bx by ay ax by bx".split()
    assert {name: (one.equal, one.peak_bytes) for name, one in results.items()} == {
        "x": ({"a": 1.0, "b": 1.0}, 1200),
        "y": ({"a": 0.0, "b": 0.0}, 1100),
    }
    assert [run.seconds for run in results["x"].runs["a"]] == [2.0, 3.0]


def test_a_run_beside_others_is_repeated_and_counts_only_if_there_is_no_other(beside: list[float]) -> None:
    calls: list[str] = []
    beside += [1.5, 0.1]
    one = take_turns({"x": answering(calls, "x")}, small("a"), 1)["x"]
    assert [(run.seconds, run.is_disturbed) for run in one.runs["a"]] == [(2.0, True), (3.0, False)]
    assert one.seconds("a") == 3.0
    beside += [1.5, 0.9, 0.5]
    one = take_turns({"x": answering([], "x")}, small("a"), 1)["x"]
    assert [run.others_cores for run in one.runs["a"]] == [1.5, 0.9, 0.5] and one.seconds("a") == 3.0


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_system_that_fails_is_left_out_with_its_reason(fails_at: int, beside: list[float]) -> None:
    failed: dict[str, str] = {}
    systems = {"x": answering([], "x", fails_at=fails_at), "y": answering([], "y")}
    results = take_turns(systems, small("a"), 1, on_failure=failed.__setitem__)
    assert list(results) == ["y"] and failed == {"x": "it broke"}


def test_processes_are_counted_by_linux() -> None:
    with watch_others() as others:
        assert others.cores is None
    has_proc = Path("/proc/self/status").exists()
    assert (others.cores is not None and others.cores >= 0) == has_proc
    assert ((peak_bytes() or 0) > 2**20) == has_proc
    assert peak_bytes(2**22 + 1) is None  # beyond the largest id


def test_the_workloads_are_the_same_for_every_seed_and_shrink_with_the_scale() -> None:
    given = workloads(1000, 1.0, 3)
    assert [one.name for one in given.values()] == [
        "one request, 128 tokens in, 128 out",
        "32 requests, 16..128 tokens in and out",
        "one request, 1500 tokens in, 1 out",
    ]
    assert workloads(1000, 1.0, 3) == given != workloads(1000, 1.0, 4)
    assert len(workloads(1000, 0.1, 3)["c"].prompts[0]) == 150


def test_the_command_measures_each_in_its_process_and_names_what_is_left_out(tmp_path: Path, folder: Path) -> None:
    model = save_random_checkpoint("qwen3", tmp_path / "model")
    words = ["bench", "peers", "--model", str(model), "--dtype", "float32", "--peer", "transformers", "--repeats", "1"]
    words += ["--peer", "llama.cpp", "--scale", "0.01", "--threads", "1", "--figures", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    report = PeersReport.read(tmp_path / "bench-peers.json")
    assert list(report.peers) == ["paged float32", "transformers float32"]
    for one in report.peers.values():
        assert one.runs.keys() == one.equal.keys() == {"a", "b", "c"} and set(one.equal.values()) == {1.0}
        assert one.peak_bytes is None or one.peak_bytes > 2**27
    (reason,) = report.left_out.values()
    assert "llama.cpp needs a GGUF file" in reason and reason in " ".join(result.output.split())
    assert report.machine["torch_threads"] == 1 and report.machine["versions"].keys() == {"paged", "transformers"}


@pytest.mark.parametrize("words", [["--peer", "ollama"], ["--dtype", "int8"]])
def test_an_unknown_name_is_one_line(words: list[str]) -> None:
    result = CliRunner().invoke(app, ["bench", "peers", *words])
    assert result.exit_code == 2 and words[1] in result.output
