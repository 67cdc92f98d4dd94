"""bench serve: real servers and a real client, answers held to LLM.generate's, and numbers that agree."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from listening import Listening
from typer.testing import CliRunner

from paged_infer import LLM, AsyncLLM
from paged_infer.bench.http import client as http_load
from paged_infer.bench.http.client import Job, ask
from paged_infer.bench.http.http_bench import OFFLINE, HttpBench, HttpSystem, bounds
from paged_infer.bench.metrics import Metrics, Percentiles
from paged_infer.bench.roofline import Roofline
from paged_infer.bench.speed.engine_runs import run_engine
from paged_infer.bench.speed.measure import Bench, SpeedReport
from paged_infer.bench.workloads import Workload, random_ids, random_lengths
from paged_infer.cli import app
from paged_infer.server.app import create_app, observe_loop_delay

ROOF = Roofline(1e9, 1e9, 1e10, "float32", "cpu")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(device="cpu", num_blocks=64, max_num_seqs=4)


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    engine = AsyncLLM(device="cpu", num_blocks=64, max_num_seqs=4)
    with Listening(create_app(engine)) as url:
        yield url
    asyncio.run(engine.shutdown())


@pytest.fixture(scope="module")
def naive() -> Iterator[str]:
    """A server of one request at a time."""
    engine = AsyncLLM(device="cpu", num_blocks=64, max_num_seqs=1)
    with Listening(create_app(engine)) as url:
        yield url
    asyncio.run(engine.shutdown())


@pytest.fixture(scope="module")
def target(served: str) -> Iterator[HttpSystem]:
    with ThreadPoolExecutor(1) as client:  # a process of its own is for the command
        yield HttpSystem(client, served, "storyteller")


@pytest.fixture
def workload(llm: LLM) -> Workload:
    return random_lengths(llm, num_requests=4, shortest=3, longest=9, seed=1)


def body(prompt: str = "Once", **others: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **others}


def test_everybody_gives_the_texts_of_llm_generate(
    llm: LLM, target: HttpSystem, naive: str, workload: Workload
) -> None:
    order: list[str] = []
    slow = HttpSystem(target.client, naive, "storyteller")
    apart = HttpSystem(target.client, target.url, "storyteller")  # its process is for the command
    bench = HttpBench(target, workload, 2, order.append, Bench(llm, ROOF, 2), slow, engine_process=apart)
    report = bench.report([1, 2], None, [0.5])
    names = [entry.name for entry in report.entries]
    closed = ["1 client", "2 clients", "1 client, streaming", "2 clients, streaming"]
    others = [f"{n}, engine process{how}" for how in ("", ", streaming") for n in ("1 client", "2 clients")]
    assert names[:-3] == [OFFLINE, *closed, *others]
    assert names[-3:-1] == ["1 client, one request at a time", "2 clients, one request at a time"]
    assert order[:18] == [OFFLINE, *closed, *others] * 2, "contenders take turns"
    assert report.is_right and all(entry.same_tokens for entry in report.entries[1:])
    served_per_s = len(workload.prompts) / report["2 clients, streaming"].metrics.seconds
    assert report.entries[-1].load == pytest.approx(0.5 * served_per_s)


def test_the_end_of_the_reasoning_is_clocked_on_both_sides_of_http(workload: Workload) -> None:
    options = {"device": "cpu", "num_blocks": 64, "max_num_seqs": 4, "reasoning_parser": "deepseek_r1"}
    llm = LLM(**options)  # type: ignore[arg-type]
    long = random_lengths(llm, num_requests=4, shortest=12, longest=14, seed=1).bounded(3)
    engine = AsyncLLM(**options)  # type: ignore[arg-type]
    with Listening(create_app(engine)) as url, ThreadPoolExecutor(1) as client:
        system = HttpSystem(client, url, "storyteller")
        streamed, whole = (system.run(long, stream=stream, num_clients=2) for stream in (True, False))
    asyncio.run(engine.shutdown())
    for run in (streamed, run_engine(llm.engine, long, num_clients=2)):
        for one in run.times:
            assert one.reasoning_s is not None and one.ttfc_s is not None
            assert one.ttft_s <= one.reasoning_s <= one.ttfc_s <= one.latency_s
        metrics = Metrics.of([run], None)
        assert metrics.ttft_s is not None and metrics.reasoning_s is not None and metrics.ttfc_s is not None
        assert metrics.ttft_s.p50 <= metrics.reasoning_s.p50 <= metrics.ttfc_s.p50
    assert Metrics.of([whole], None).ttfc_s is None, "when a whole answer's content began is not known"
    assert run_engine(llm.engine, workload).times[0].ttfc_s is None, "its budget is longer than the answers"


@pytest.mark.parametrize(
    "pieces", [["a</think>b"], ["a</", "think>", "b"], ["a</th", "</thi", "nk>b"], ["</think>", "b"]]
)
def test_the_marker_is_found_however_the_stream_is_cut(pieces: list[str]) -> None:
    clocks = http_load._ReasoningClocks()
    for now, piece in enumerate(pieces):
        clocks.note(piece, now)
    ends = [n for n in range(len(pieces)) if "</think>" in "".join(pieces[: n + 1])]
    assert clocks.reasoned_s == ends[0] and clocks.content_s == len(pieces) - 1
    none = http_load._ReasoningClocks()
    none.note("a</thinkb", 1.0)
    assert none.reasoned_s is None and none.content_s is None


def test_another_text_and_a_missing_token_are_found_out(
    llm: LLM, target: HttpSystem, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = HttpSystem.run

    def corrupted(self: HttpSystem, *arguments: Any, **options: Any) -> Any:
        run = real(self, *arguments, **options)
        run.texts[0] += "!"
        run.times[-1].num_output -= 1
        return run

    monkeypatch.setattr(HttpSystem, "run", corrupted)
    bench = HttpBench(target, workload, 1, lambda name: None, Bench(llm, ROOF, 1))
    report = bench.report([2], [100.0], [])
    wrong = report["2 clients"]
    assert wrong.same_tokens is False and wrong.same_counts is False and not report.is_right


def test_only_a_streamed_answer_tells_when_it_began(target: HttpSystem, workload: Workload) -> None:
    streamed = Metrics.of([target.run(workload, stream=True, num_clients=2)], None)
    whole = Metrics.of([target.run(workload, stream=False, num_clients=2)], None)
    assert streamed.ttft_s is not None and streamed.tpot_s is not None and streamed.latency_s is not None
    assert 0 < streamed.ttft_s.p50 <= streamed.latency_s.p50
    assert whole.ttft_s is None and whole.tpot_s is None and whole.latency_s is not None
    asked = sum(one.max_tokens or 0 for one in workload.params)
    for metrics in (streamed, whole):
        assert metrics.output_tokens_per_s * metrics.seconds == pytest.approx(asked)


def test_a_streamed_answer_begins_with_its_first_piece_and_ends_with_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose pieces come at 1, 2 and 3 seconds."""
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(http_load, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))

    class Pieces(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for text in ("Once", " upon", " a time"):
                clock.now_s += 1.0
                piece = {"choices": [{"text": text}], "usage": {"completion_tokens": 3}}
                yield f"data: {json.dumps(piece)}\n\n".encode()

    async def complete() -> http_load.Reply:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Pieces()))
        async with httpx.AsyncClient(base_url="http://server", transport=transport) as http:
            return await http_load._complete(http, body(stream=True), 0.5)

    assert asyncio.run(complete()) == http_load.Reply(0.5, 1.0, 3.0, 3, "Once upon a time")


def test_a_closed_loop_never_has_more_requests_than_clients(target: HttpSystem, workload: Workload) -> None:
    times = target.run(workload, stream=False, num_clients=2).times
    moments = sorted({one.arrived_s for one in times})
    for moment in moments:
        assert sum(one.arrived_s <= moment < one.token_s[-1] for one in times) <= 2
    assert len(moments) > 2


def test_an_open_loop_counts_from_when_a_request_was_due(target: HttpSystem, workload: Workload) -> None:
    due = [0.0, 0.001, 0.05, 0.1]
    times = target.run(workload, stream=True, arrive_s=due).times
    assert [one.arrived_s for one in times] == pytest.approx(due)


def test_no_run_reads_the_prefixes_of_an_earlier_one(target: HttpSystem, llm: LLM) -> None:
    long = random_lengths(llm, num_requests=1, shortest=40, longest=40, seed=3)
    replies = [target.client.submit(ask, Job(target.url, None, target._bodies(long, True))) for _ in range(2)]
    assert replies[0].result().replies[0].text == replies[1].result().replies[0].text
    salts = [target._bodies(long, True)[0]["cache_salt"] for _ in range(2)]
    assert salts[0] != salts[1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_an_error_with_the_servers_words(served: str, stream: bool) -> None:
    with pytest.raises(ValueError, match=r"answered 400.*temperature=-1"):
        ask(Job(served, None, [body(), body(temperature=-1.0, stream=stream)]))


def test_nobody_there_is_an_error_that_names_the_address() -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9"):
        ask(Job("http://127.0.0.1:9", None, [body()]))


def test_the_naive_server_serves_one_at_a_time(naive: str) -> None:
    replies = ask(Job(naive, None, [body("Once"), body("Mia had"), body("Tom")], num_clients=3)).replies
    ends = sorted(reply.end_s for reply in replies)
    assert [reply.num_output for reply in replies] == [4, 4, 4] and len(set(ends)) == 3


def test_the_servers_own_count_of_its_loops_delays_is_read(target: HttpSystem, workload: Workload) -> None:
    delays = target.run(workload, stream=True, arrive_s=[0.0, 0.05, 0.1, 0.15]).loop_delay_s
    assert delays is not None and 0 < delays.p50 <= delays.p90 <= delays.p99


def test_bounds_are_those_that_a_share_of_the_values_does_not_exceed() -> None:
    assert bounds({0.1: 1, 0.001: 90, 0.01: 9, float("inf"): 0}) == Percentiles(0.001, 0.001, 0.01)
    assert bounds({}) is None and bounds({0.1: 0}) is None


def test_a_loop_that_stands_still_is_late_for_each_moment_that_it_missed() -> None:
    """Moments 10 ms apart, in a loop that stands still from 5 ms to 105 ms, and after that does not."""
    seen: list[float] = []
    clock = SimpleNamespace(now_s=0.0, wakes_s=iter((0.105, 0.11, 0.12)))

    async def sleep(seconds: float) -> None:
        assert seconds > 0
        clock.now_s = next(clock.wakes_s, None)
        if clock.now_s is None:
            raise asyncio.CancelledError

    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(observe_loop_delay(seen.append, every_s=0.01, clock=lambda: clock.now_s, sleep=sleep))
    missed = [0.105 - 0.01 * number for number in range(1, 11)]
    assert seen == pytest.approx([*missed, 0.0, 0.0], abs=1e-9)


def test_ids_of_any_vocabulary_and_lengths_in_order() -> None:
    workload = random_ids(1000, num_requests=20, shortest=2, longest=5, seed=0)
    assert max(map(max, workload.prompts)) < 1000
    assert {len(prompt) for prompt in workload.prompts} <= {2, 3, 4, 5}
    with pytest.raises(ValueError, match="shortest=6"):
        random_ids(1000, num_requests=1, shortest=6, longest=5, seed=0)


SMALL = ["--num-requests", "3", "--shortest", "2", "--longest", "4", "--repeats", "1", "--rate", "50"]


def test_the_command_starts_its_servers_and_leaves_numbers_and_a_picture(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("paged_infer.bench.roofline.measure", lambda device, dtype: ROOF)
    options = ["--clients", "2", "--num-blocks", "64", "--device", "cpu", "--figures", str(tmp_path)]
    options.append("--engine-process")
    result = CliRunner().invoke(app, ["bench", "serve", *SMALL, *options])
    assert result.exit_code == 0, result.output
    assert "2 clients / LLM.generate = " in result.output and "event loop late" in result.output
    report = SpeedReport.read(tmp_path / "bench-serve.json")
    assert [entry.load for entry in report.entries] == [None, 2, 2, 2, 2, 2, 50]
    assert (tmp_path / "bench-serve.png").read_bytes().startswith(b"\x89PNG")


def test_a_server_that_runs_already_is_asked_alone(served: str, tmp_path) -> None:
    options = ["--clients", "1", "--base-url", f"{served}/v1", "--figures", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "serve", *SMALL, *options])
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "bench-serve.json").read_text())
    assert (stored["model"], stored["roofline"]) == ("storyteller", None)
    assert [entry["load"] for entry in stored["entries"]] == [1, 1, 50]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--naive", "naive"],
            "naive='naive': must be cached (compare it to paged-infer serve --max-num-seqs 1) or none",
        ),
        (["--backend", "vllm"], "backend='vllm': must be openai or openai-chat"),
        (["--shortest", "9", "--longest", "3"], "shortest=9"),
        (["--base-url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["--base-url", "http://127.0.0.1:9", "--model", "x"], "its model and engine are its own"),
        (["--model", "no/such-model"], "no/such-model"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "serve", *arguments])
    assert result.exit_code == 2
    assert words in result.stderr and result.stderr.count("\n") == 1
