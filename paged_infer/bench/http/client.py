"""The client of ``bench serve``: requests for completions or chats over HTTP, and the times of their responses.

It runs in a process of its own, without torch, so that it takes no time from the server's process.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from paged_infer.text.reasoning_parsers import REASONING, ReasoningParser

TIMEOUT_S = 600.0  # of one response: the last of many requests waits long for a slow server
LOOP_DELAY = "paged_infer:event_loop_delay_seconds"
DATA, DONE = b"data: ", b"[DONE]"
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Job:
    """Requests for a server. Each is sent at its time of ``arrive_s``, or by the next free one of ``num_clients``.

    A body with messages is a chat's, any other a completion's.
    """

    url: str
    api_key: str | None
    bodies: list[dict[str, Any]]
    num_clients: int | None = None
    arrive_s: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """Seconds of ``time.perf_counter``. For a response that came whole, ``first_s`` is ``end_s``.

    ``reasoned_s`` and ``content_s``: the end of its reasoning, and the first text after it; None if it had none.
    ``text``: of a chat, its reasoning and then its content. ``num_prompt``: None if the server does not count it.
    """

    arrived_s: float  # in an open loop: when it was due, however late the client was
    first_s: float
    end_s: float
    num_output: int
    text: str
    reasoned_s: float | None = None
    content_s: float | None = None
    num_prompt: int | None = None


@dataclass(frozen=True, slots=True)
class Replies:
    """In the order of the bodies. ``loop_delays``: how late the server's event loop was, a histogram {seconds: count}
    by upper bounds; empty where the server does not report them.
    """

    replies: list[Reply]
    loop_delays: dict[float, int]


def ask(job: Job) -> Replies:
    """Send the requests of ``job``. Raises ValueError, with the server's message, if one fails."""
    try:
        return asyncio.run(_ask(job))
    except ExceptionGroup as group:
        error = group.exceptions[0]
    except httpx.TransportError as its_error:
        error = its_error
    raise ValueError(f"{job.url}: {error if isinstance(error, ValueError) else repr(error)}")


async def _ask(job: Job) -> Replies:
    headers = {} if job.api_key is None else {"Authorization": f"Bearer {job.api_key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=job.url, headers=headers, limits=limits, timeout=TIMEOUT_S) as http:
        before = await _loop_delays(http)
        replies = await (_open_loop(http, job) if job.arrive_s is not None else _closed_loop(http, job))
        after = await _loop_delays(http)
    return Replies(replies, {bound: after[bound] - before.get(bound, 0) for bound in after})


async def _closed_loop(http: httpx.AsyncClient, job: Job) -> list[Reply]:
    replies: dict[int, Reply] = {}
    requests = iter(enumerate(job.bodies))

    async def client() -> None:
        for index, body in requests:  # one iterator for all clients
            replies[index] = await _complete(http, body, time.perf_counter())

    async with asyncio.TaskGroup() as clients:
        for _ in range(job.num_clients or 1):
            clients.create_task(client())
    return [replies[index] for index in range(len(job.bodies))]


async def _open_loop(http: httpx.AsyncClient, job: Job) -> list[Reply]:
    begin_s, tasks = time.perf_counter(), []
    async with asyncio.TaskGroup() as requests:
        for body, at_s in zip(job.bodies, job.arrive_s or [], strict=True):
            await asyncio.sleep(begin_s + at_s - time.perf_counter())
            tasks.append(requests.create_task(_complete(http, body, begin_s + at_s)))
    return [task.result() for task in tasks]


async def _complete(http: httpx.AsyncClient, body: dict[str, Any], arrived_s: float) -> Reply:
    path = CHATS if "messages" in body else COMPLETIONS
    if not body.get("stream"):
        response = await http.post(path, json=body)
        end_s = time.perf_counter()
        _check(response)
        answer = response.json()
        text, usage = "".join(_texts(answer["choices"][0])), answer["usage"]
        return Reply(arrived_s, end_s, end_s, usage["completion_tokens"], text, num_prompt=usage.get("prompt_tokens"))
    first_s, end_s, usage = 0.0, 0.0, dict[str, int]()
    texts: dict[str, list[str]] = {"reasoning": [], "content": []}
    clocks = _ReasoningClocks()
    async with http.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            await response.aread()
        _check(response)
        rest = b""
        async for chunk in response.aiter_bytes():
            now = time.perf_counter()
            *events, rest = (rest + chunk).split(b"\n\n")
            for piece in _pieces(events):
                for choice in piece["choices"]:
                    reasoning, content = _texts(choice)
                    if "text" in choice or reasoning or content or choice.get("finish_reason"):  # not only a role
                        first_s, end_s = first_s or now, now
                    texts["reasoning"].append(reasoning)
                    texts["content"].append(content)
                    clocks.note(content, now, reasoning)
                usage = piece.get("usage") or usage
    text = "".join(texts["reasoning"] + texts["content"])
    times = (clocks.reasoned_s, clocks.content_s)
    return Reply(arrived_s, first_s, end_s, usage.get("completion_tokens", 0), text, *times, usage.get("prompt_tokens"))


def _texts(choice: dict[str, Any]) -> tuple[str, str]:
    """The reasoning and the content of an answer, or of a piece of one; a completion has both in one text."""
    if "text" in choice:
        return "", choice["text"]
    message = choice.get("delta") or choice.get("message") or {}
    # vLLM's name, and its older one, which DeepSeek's API has, too; a server may send both with the same text.
    return message.get("reasoning") or message.get("reasoning_content") or "", message.get("content") or ""


class _ReasoningClocks:
    """When the reasoning of a streamed answer ended, and when text came after it.

    A completion has the end's marker in its text, if it thought. A chat's pieces have the reasoning apart, without the
    marker, so it ended with the last of them: some tokens earlier than in the engine, as many as the marker has.
    """

    def __init__(self) -> None:
        self.reasoned_s: float | None = None
        self.content_s: float | None = None
        self._parser = ReasoningParser(REASONING)  # of a text with both; without the marker, there is no content
        self._apart_s: float | None = None  # when the last piece of reasoning came apart from the content

    def note(self, text: str, now: float, reasoning: str = "") -> None:
        if self.content_s is not None:
            return
        if reasoning:
            self._apart_s = now
        if self._apart_s is None:
            text = self._parser.feed(text).content
            if self._parser.has_ended and self.reasoned_s is None:
                self.reasoned_s = now
        elif text:
            self.reasoned_s = self._apart_s
        if text:
            self.content_s = now


def _pieces(events: list[bytes]) -> Iterator[dict[str, Any]]:
    for event in events:
        content = event.strip().removeprefix(DATA)
        if event.strip().startswith(DATA) and content != DONE:
            piece = json.loads(content)
            if "error" in piece:
                raise ValueError(f"the server ended a response early: {piece['error']['message']}")
            yield piece


def _check(response: httpx.Response) -> None:
    if response.status_code != 200:
        raise ValueError(f"the server answered {response.status_code}: {response.text[:300]}")


async def _loop_delays(http: httpx.AsyncClient) -> dict[float, int]:
    """Since the server was started."""
    response = await http.get("/metrics")
    if response.status_code != 200:
        return {}
    counts: dict[float, int] = {}
    num_below = 0
    for line in response.text.splitlines():
        if line.startswith(f"{LOOP_DELAY}_bucket{{"):
            labels, _, value = line.rpartition(" ")
            bound = float(labels.split('le="')[1].split('"')[0])
            counts[bound], num_below = int(float(value)) - num_below, int(float(value))
    return counts
