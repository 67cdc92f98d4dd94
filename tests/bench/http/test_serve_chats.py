"""bench serve on chats: the same texts as LLM.generate's, and three clocks by the pieces of a streamed answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from listening import Listening
from typer.testing import CliRunner

from paged_infer import LLM, AsyncLLM, SamplingParams
from paged_infer.bench.http import client as http_load
from paged_infer.bench.http import http_bench, servers
from paged_infer.bench.http.http_bench import HttpSystem
from paged_infer.bench.metrics import Metrics
from paged_infer.bench.roofline import Roofline
from paged_infer.bench.speed.measure import SpeedReport
from paged_infer.bench.workloads import OPENINGS, Workload, random_words, user_message
from paged_infer.cli import app
from paged_infer.config import EngineOptions
from paged_infer.server.app import create_app
from paged_infer.storyteller.stories.sums import tell_sum

THINKING: EngineOptions = {"device": "cpu", "num_blocks": 128, "max_num_seqs": 4, "reasoning_parser": "qwen3"}
ROOF = Roofline(1e9, 1e9, 1e10, "float32", "cpu")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("storyteller-steps", **THINKING)


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    engine = AsyncLLM("storyteller-steps", **THINKING)
    with Listening(create_app(engine)) as url:
        yield url
    asyncio.run(engine.shutdown())


def test_a_thought_is_clocked_by_the_pieces_of_a_chat(llm: LLM, served: str) -> None:
    told = [tell_sum(seed, held_out=True) for seed in range(3)]
    texts = [f"{one.story} {one.question.question}" for one in told]
    prompts = [llm.chat_prompt([user_message(text)]) for text in texts]
    sums = Workload("sums", prompts, [SamplingParams(temperature=0, max_tokens=96)] * 3, 0, texts)
    expected = [output.outputs[0].text for output in llm.generate(prompts, sums.params, use_tqdm=False)]
    with ThreadPoolExecutor(1) as client:
        system = HttpSystem(client, served, "storyteller-steps")
        streamed, whole = (system.run(sums, stream=stream, num_clients=3) for stream in (True, False))
    for one, prompt in zip(streamed.times, prompts, strict=True):
        assert one.reasoning_s is not None and one.ttfc_s is not None
        assert one.ttft_s <= one.reasoning_s <= one.ttfc_s <= one.latency_s
        assert one.num_prompt == len(prompt)
    assert all("</think>" in text for text in expected), "they thought"
    joined = [text.replace("<think>", "").replace("</think>", "") for text in expected]
    assert streamed.texts == whole.texts == joined
    assert Metrics.of([whole], None).ttfc_s is None, "when a whole answer's content began is not known"


ROLE: dict[str, Any] = {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("deltas", "text", "clocks"),
    [
        ([ROLE, {"reasoning": "a"}, {"reasoning": "b"}, {}, {"content": "c"}, {"content": "d"}], "abcd", (3.0, 5.0)),
        ([ROLE, {"reasoning_content": "a"}, {"content": "c"}], "ac", (2.0, 3.0)),
        ([ROLE, {"reasoning": "a", "reasoning_content": "a", "content": "c"}], "ac", (2.0, 2.0)),
        ([ROLE, {"reasoning": "a"}, {"reasoning": "b"}], "ab", (None, None)),
        ([ROLE, {"content": "c"}, {"content": "d"}], "cd", (None, None)),
        ([ROLE, {"content": "a</thi"}, {"content": "nk>"}, {"content": "c"}], "a</think>c", (3.0, 4.0)),
    ],
    ids=["vllm", "deepseek", "both names", "cut off", "no reasoning", "no parser"],
)
def test_the_pieces_of_a_chat_come_at_1_2_3_seconds(
    deltas: list[dict[str, Any]], text: str, clocks: tuple[float | None, float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one, with the role alone, is no token; the reasoning ended with its last piece."""
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(http_load, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))
    paths = []

    class Pieces(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for delta in deltas:
                clock.now_s += 1.0
                yield f"data: {json.dumps({'choices': [{'delta': delta, 'finish_reason': None}]})}\n\n".encode()
            usage = {"prompt_tokens": 7, "completion_tokens": 9}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode()

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        return httpx.Response(200, stream=Pieces())

    async def complete() -> http_load.Reply:
        async with httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(answer)) as http:
            body = {"messages": [user_message("Hello")], "stream": True}
            return await http_load._complete(http, body, 0.5)

    reply = asyncio.run(complete())
    assert paths == ["/v1/chat/completions"]
    assert reply == http_load.Reply(0.5, 2.0, float(len(deltas)), 9, text, *clocks, num_prompt=7)


SMALL = ["--num-requests", "3", "--shortest", "9", "--longest", "11", "--repeats", "1", "--rate", "50"]
CHATS = ["bench", "serve", *SMALL, "--backend", "openai-chat", "--clients", "2", "--thinking-token-budget", "3"]


@pytest.fixture
def one_process(served: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command's client is a thread, and its server is ``served``; gives the arguments that would start it."""
    arguments = list[str]()
    monkeypatch.setattr(http_bench, "client_process", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr("paged_infer.bench.roofline.measure", lambda device, dtype: ROOF)
    monkeypatch.setattr(servers, "running", lambda *given, **_: arguments.extend(given) or nullcontext(served))
    return arguments


def test_the_command_holds_chats_to_the_texts_of_llm_generate(one_process: list[str], tmp_path) -> None:
    model = ["--model", "storyteller-steps", "--reasoning-parser", "qwen3", "--num-blocks", "128", "--device", "cpu"]
    result = CliRunner().invoke(app, [*CHATS, *model, "--naive", "none", "--figures", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "--reasoning-parser" in one_process and "first content" in result.output
    report = SpeedReport.read(tmp_path / "bench-serve.json")
    assert report.workload.endswith("as chats, 3 of reasoning") and report.num_output_tokens >= 27
    whole, streamed, opened = report.entries[1:]
    assert whole.same_tokens and streamed.same_tokens and opened.same_tokens
    for entry in (streamed, opened):
        metrics = entry.metrics
        assert metrics.ttft_s is not None and metrics.reasoning_s is not None and metrics.ttfc_s is not None
        assert metrics.reasoning_s.p50 <= metrics.ttfc_s.p50, "of the requests that thought"


def test_a_chat_with_a_server_that_runs_already_is_in_words(one_process: list[str], served: str, tmp_path) -> None:
    result = CliRunner().invoke(app, [*CHATS, "--base-url", served, "--figures", str(tmp_path)])
    assert result.exit_code == 0, result.output
    report = SpeedReport.read(tmp_path / "bench-serve.json")
    assert report.workload == "3 chats, 9..11 words in and tokens out, 3 of reasoning" and not one_process
    drawn = random_words(3, 9, 11, 0)
    assert {word for text in drawn.texts for word in text.split()} <= set(" ".join(OPENINGS).split())
    assert report.num_prompt_tokens > sum(map(len, drawn.prompts)), "as the server counts them"


def test_a_model_without_a_tokenizer_has_no_chats(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.engine.input_processor, "tokenizer", None)
    monkeypatch.setattr(type(llm), "tokenizer", None)
    with pytest.raises(ValueError, match="has no tokenizer"):
        Workload("w", [[5]], [SamplingParams()], 0).as_chats(llm)
