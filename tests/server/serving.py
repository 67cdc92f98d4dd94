"""Servers for the tests: the real uvicorn on a free port of 127.0.0.1, in a thread, over a small engine."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx
import uvicorn
from holding import LIMIT_S, Steps, held, until
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI

from paged_infer import AsyncLLM
from paged_infer.engine.engine import LLMEngine
from paged_infer.server.app import create_app
from paged_infer.server.run import Server, listen
from paged_infer.server.service import Settings

T = TypeVar("T")
NO_TLS: dict[str, Any] = {"verify": False}  # to read the certificates takes each client 50 ms, and nothing here has any


class Served:
    """A server that runs, and clients of it."""

    def __init__(
        self, settings: Settings, shutdown_timeout_s: float = LIMIT_S, http: Any = "auto", **options: Any
    ) -> None:
        self.engine = AsyncLLM(options.pop("model", None), device="cpu", **options)
        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        app = create_app(self.engine, settings)
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=int(LIMIT_S), http=http)
        self.server = Server(self.engine, config, shutdown_timeout_s)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        self.api_key = settings.api_key or "unused"
        self.http = httpx.Client(base_url=self.url, timeout=LIMIT_S, **NO_TLS)
        until(lambda: self.server.started)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, **body: Any) -> dict[str, Any]:
        response = self.post("/v1/completions", **body)
        assert response.status_code == 200, response.text
        return response.json()

    def begin(self, path: str = "/v1/completions", **body: Any) -> Future[httpx.Response]:
        """Post from another thread."""
        answer: Future[httpx.Response] = Future()

        def ask() -> None:
            try:
                answer.set_result(httpx.post(f"{self.url}{path}", json=body, timeout=LIMIT_S, **NO_TLS))
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()
        return answer

    def held(self) -> contextlib.AbstractContextManager[Steps]:
        return held(self.engine)

    def until_queued(self, **sizes: int) -> None:
        """Wait until each queue has its size: ``until_queued(running=1, waiting=2)``."""
        stats = self.engine.stats
        until(lambda: all(stats()[f"num_{queue}"] == size for queue, size in sizes.items()), stats)

    def openai(self) -> OpenAI:
        client = DefaultHttpxClient(timeout=LIMIT_S, **NO_TLS)
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0, http_client=client)

    def async_openai(self) -> AsyncOpenAI:
        client = DefaultAsyncHttpxClient(timeout=LIMIT_S, **NO_TLS)
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0, http_client=client)

    def is_idle(self) -> bool:
        stats = self.engine.stats()
        busy = stats["num_running"] or stats["num_waiting"] or stats["num_swapped"]
        return stats["free_blocks"] == stats["num_blocks"] and not busy

    def check_idle(self) -> None:
        """Law 2: every block becomes free."""
        until(self.is_idle, self.engine.stats)
        self.on_engine(LLMEngine.check_integrity)

    def on_engine(self, function: Callable[[LLMEngine], T]) -> T:
        """``AsyncLLM.run`` without an event loop: a browser's driver has one in this thread already."""
        return self.engine._core.call(function).result(LIMIT_S)

    def in_loop(self, function: Callable[[], T]) -> T:
        """The result of ``function()``, called in the server's event loop."""

        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(LIMIT_S)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self.server.servers[0].get_loop()

    def stop(self) -> None:
        self.http.close()
        self.server.stop()
        self.thread.join(LIMIT_S)
        assert not self.thread.is_alive()


PROMPT = {"prompt": "Once upon a time", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "Where is the key?"}], "max_tokens": 2}
LONG_BODY: dict[str, Any] = {
    "model": "storyteller",
    "prompt": "Once upon a time",
    "max_tokens": 900,
    "extra_body": {"ignore_eos": True},
}


def error_of(response: Any, status: int) -> dict[str, Any]:
    """The error in a response with this status."""
    assert response.status_code == status, (response.status_code, response.text)
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@contextlib.contextmanager
def serving(settings: Settings | None = None, **options: Any) -> Iterator[Served]:
    served = Served(settings or Settings(), **options)
    try:
        yield served
        if served.engine.error is None:
            served.check_idle()
    finally:
        served.stop()


def poll(served: Served, job_id: str) -> dict[str, Any]:
    """The result of a job, once it has ended."""
    answers: list[dict[str, Any]] = []

    def has_ended() -> bool:
        answers.append(served.http.get(f"/result/{job_id}").json())
        return answers[-1]["status"] != "running"

    until(has_ended)
    return answers[-1]
