"""Crowds: hundreds that leave in mid-stream, hundreds in a pool that is far too small."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import pytest
from serving import Served, serving

from paged_infer import SamplingParams


async def ask(served: Served, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Raw HTTP: a client that can leave without a word, and that costs little."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    )
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
            body = {
                "prompt": f"Story {i}",
                "max_tokens": 500,
                "ignore_eos": True,
                "stream": i % 3 > 0,
                "n": 1 + i % 2,
            }
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
        assert not served.engine._streams and not served.engine._thread._mailboxes
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
    said = storyteller.generate([body["prompt"] for body in bodies], params, use_tqdm=False)
    with serving(max_num_seqs=32, num_blocks=40, block_size=4, max_model_len=64) as served:

        async def main() -> list[dict[str, Any]]:
            return await asyncio.gather(*(answer(served, body) for body in bodies))

        answers = asyncio.run(main())
        assert [a["choices"][0]["text"] for a in answers] == [one.outputs[0].text for one in said]
        assert served.engine.stats()["preemptions"] > 100


def test_the_event_loop_is_hardly_ever_late() -> None:
    """99 % of its delays are under 50 ms, with 32 streams and long texts to read.

    In one of three tries: a busy machine delays, too, but what stands still by itself does so in each.
    """
    with serving(max_num_seqs=32, num_blocks=512) as served:
        for _ in range(3):
            delays = loop_delays(served)
            if delays[int(0.99 * len(delays))] < 0.05:
                return
        pytest.fail(f"the latest: {delays[-10:]}")


def loop_delays(served: Served) -> list[float]:
    """In seconds, the shortest first."""
    delays: list[float] = []

    async def watch() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.002)
            delays.append(time.perf_counter() - began - 0.002)

    async def main() -> None:
        long = {
            "prompt": "The river was wide. " * 5000,
            "truncate_prompt_tokens": 50,
        }  # 100,000 characters
        bodies = [{"prompt": f"Story {i}", **(long if i % 16 == 0 else {})} for i in range(32)]
        common = {"max_tokens": 40, "ignore_eos": True}
        readers = [await ask(served, {**body, **common, "stream": True}) for body in bodies]
        await asyncio.gather(*(reader.read() for reader, _ in readers))

    watcher = asyncio.run_coroutine_threadsafe(watch(), _loop_of(served))
    asyncio.run(main())
    watcher.cancel()
    assert len(delays) > 50
    return sorted(delays)


def _loop_of(served: Served) -> asyncio.AbstractEventLoop:
    return served.server.servers[0].get_loop()


@pytest.mark.parametrize("num_prompts", [8])
def test_a_client_of_many_prompts_that_leaves_aborts_all_of_them(num_prompts: int) -> None:
    with serving(max_num_seqs=4, num_blocks=128) as served:

        async def main(stream: bool) -> None:
            body = {"prompt": ["Once"] * num_prompts, "max_tokens": 900, "ignore_eos": True, "stream": stream}
            _, writer = await ask(served, body)
            while served.engine.stats()["num_running"] < 4:
                await asyncio.sleep(0.002)
            writer.transport.abort()

        for stream in (False, True):
            asyncio.run(main(stream))
            served.check_idle()
