"""Crowds: hundreds that leave in mid-stream, hundreds in a pool that is far too small."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from typing import Any

import pytest
from holding import LIMIT_S, Steps
from serving import Served, serving

from paged_infer import SamplingParams


async def ask(served: Served, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Raw HTTP: a client that can leave without a word, and that costs little."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    await writer.drain()
    return reader, writer


async def answer(served: Served, body: dict[str, Any]) -> dict[str, Any]:
    reader, writer = await ask(served, body)
    head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 200"), head + content
    return json.loads(content)


def test_hundreds_that_leave_in_mid_stream_leave_nothing_behind() -> None:
    with serving(max_num_seqs=32, num_blocks=128, max_model_len=512) as served:

        async def fickle(i: int) -> int:
            chance = random.Random(i)
            body = {"prompt": f"Story {i}", "max_tokens": 500, "ignore_eos": True, "stream": i % 3 > 0, "n": 1 + i % 2}
            reader, writer = await ask(served, body)
            if i % 3 and i % 4:  # leave in mid-stream, or before any of it
                await reader.readuntil(b"data: ")
            await asyncio.sleep(chance.random() * 0.3)
            writer.transport.abort()
            return 1

        async def main() -> int:
            return sum(await asyncio.gather(*(fickle(i) for i in range(300))))

        assert asyncio.run(main()) == 300
        served.check_idle()
        assert not served.engine._streams and not served.engine._core._channels
        assert served.complete(prompt="Once", max_tokens=3)["usage"]["completion_tokens"] == 3


def test_five_hundred_at_once_in_a_pool_that_preempts_constantly_get_the_offline_answers(storyteller) -> None:
    beginnings = ["Once upon a time", "Mia had a red key", "The river was wide", "One morning, Tom"]
    bodies = [
        {
            "prompt": f"{beginnings[i % 4]}{' and' * (i % 5)}",
            "max_tokens": 6 + i % 7,
            "temperature": (i % 3) / 2,
            "seed": i,
            "ignore_eos": True,
        }
        for i in range(500)
    ]
    params = [SamplingParams(**{k: v for k, v in body.items() if k != "prompt"}) for body in bodies]
    reference = storyteller.generate([body["prompt"] for body in bodies], params, use_tqdm=False)
    with serving(max_num_seqs=32, num_blocks=40, block_size=4, max_model_len=64) as served:

        async def main() -> list[dict[str, Any]]:
            answers = [asyncio.create_task(answer(served, body)) for body in bodies]
            await asyncio.to_thread(served.until_queued, waiting=len(bodies))
            steps.allow()
            return await asyncio.gather(*answers)

        with served.held() as steps:
            answers = asyncio.run(main())
        assert [a["choices"][0]["text"] for a in answers] == [one.outputs[0].text for one in reference]
        assert served.engine.stats()["preemptions"] > 100


def test_the_event_loop_answers_while_a_step_and_a_long_text_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is done in the event loop: both stand still here, until others have been answered."""
    long_text = "The river was wide. " * 5000  # 100,000 characters
    with serving(max_num_seqs=4, num_blocks=64) as served:
        go_on, under_way = threading.Event(), threading.Semaphore(0)

        def stand_still() -> None:
            under_way.release()
            assert go_on.wait(LIMIT_S)

        engine, tokenizer = served.engine._core.engine, served.engine.tokenizer
        launch, encode = engine.executor.runner.launch, tokenizer.encode

        def slow_launch(step: Any) -> Any:
            stand_still()
            return launch(step)

        def slow_encode(text: str, *arguments: Any, **options: Any) -> Any:
            if text == long_text:
                stand_still()
            return encode(text, *arguments, **options)

        monkeypatch.setattr(engine.executor.runner, "launch", slow_launch)
        monkeypatch.setattr(tokenizer, "encode", slow_encode)
        bodies = [{"prompt": "Once"}, {"prompt": long_text, "truncate_prompt_tokens": 50}]
        answers = [served.begin(**body, max_tokens=4) for body in bodies]
        for _ in bodies:
            assert under_way.acquire(timeout=LIMIT_S)
        for path in ("/health", "/metrics", "/v1/models"):
            assert served.http.get(path).status_code == 200
        job = served.post("/generate", prompt="Mia", max_tokens=4).json()
        assert served.http.get(f"/result/{job['id']}").json()["status"] == "running"
        assert not any(one.done() for one in answers)
        go_on.set()
        assert [one.result(LIMIT_S).status_code for one in answers] == [200, 200]


@pytest.mark.parametrize("num_prompts", [8])
def test_a_client_of_many_prompts_that_leaves_aborts_all_of_them(num_prompts: int) -> None:
    with serving(max_num_seqs=4, num_blocks=128) as served:

        async def main(stream: bool, steps: Steps) -> None:
            body = {"prompt": ["Once"] * num_prompts, "max_tokens": 900, "ignore_eos": True, "stream": stream}
            _, writer = await ask(served, body)
            await asyncio.to_thread(served.until_queued, waiting=num_prompts)
            steps.run(2)
            assert served.engine.stats()["num_running"] == 4
            writer.transport.abort()

        for stream in (False, True):
            with served.held() as steps:
                asyncio.run(main(stream, steps))
                served.check_idle()
