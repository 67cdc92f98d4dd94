"""The engine as the routes see it: prompts in, outputs out, and each failure as an ``APIError``."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable
from collections.abc import Sequence as ReadOnlyList
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import Request

from paged_infer.async_llm import AsyncLLM, EngineDeadError, QueueFullError, RequestStream
from paged_infer.control.admission import ContextLengthError
from paged_infer.engine.input_processor import Params
from paged_infer.engine.prompts import Prompt
from paged_infer.outputs import RequestOutput
from paged_infer.params import BeamSearchParams
from paged_infer.server.hosts import ALL
from paged_infer.server.openai.errors import APIError
from paged_infer.server.openai.event_stream import close_all
from paged_infer.server.openai.field_checks import bad_value
from paged_infer.text.reasoning_parsers import END
from paged_infer.text.tool_parsers import TOOL_PARSERS, HermesParser

logger = logging.getLogger("uvicorn.error")

RETRY_AFTER_S = 1
PROMPTS_PER_TURN = 32  # prompts that are queued before other tasks of the event loop run
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")
# A name or an IPv6 address; the port is ignored.
_HOST = re.compile(
    r"(\*\.)?[\w-]+(\.[\w-]+)*\.?(:\d+)?|\[?[0-9a-f]*:[0-9a-f]*:[\w:.%-]*\]?(:\d+)?", re.ASCII | re.IGNORECASE
)
CLOSING = "the server is shutting down"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The server's options. The defaults are for one user on one machine.

    Args:
        api_key: required from clients as ``Authorization: Bearer ...``; None requires none.
        allowed_hosts: allowed values of the ``Host`` header: names, ``*.domain``, or ``*`` for any.
        allowed_origins: origins (``https://name:port``, or ``*``) whose pages may call the server (CORS).
        served_model_names: names that clients use for the model; answers have the first. Empty: the model's own name.
        max_body_bytes: largest body of a request.
        receive_timeout_s: seconds that a request may take to arrive: its head, and then its body.
        max_n: the most samples or beams per prompt.
        max_num_logprobs: most logprobs that one request could get, including each token's own. They take 200 bytes
            each and are kept until the request has finished.
        result_ttl_s: seconds that ``/result/{id}`` keeps an answer.
        max_num_results: most such answers kept at once; beyond it, the oldest is dropped.
        tool_call_parser: how the model writes tool calls, one of ``text.tool_parsers.TOOL_PARSERS``. None: an answer
            has calls only if the request requires them.
    """

    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = (ALL,)
    allowed_origins: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ()
    max_body_bytes: int = 1 << 20
    receive_timeout_s: float = 30.0
    max_n: int = 128
    max_num_logprobs: int = 1 << 22
    result_ttl_s: float = 300.0
    max_num_results: int = 10_000
    tool_call_parser: str | None = None

    def __post_init__(self) -> None:
        for name in "max_body_bytes receive_timeout_s max_n max_num_logprobs result_ttl_s max_num_results".split():
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be > 0")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key: must be printable ASCII, and not empty")
        for host in self.allowed_hosts:
            if host != ALL and not _HOST.fullmatch(host):
                raise ValueError(f"allowed_hosts={host!r}: must be a host name, *.domain or *")
        if self.tool_call_parser not in (None, *TOOL_PARSERS):
            raise ValueError(f"tool_call_parser={self.tool_call_parser!r}: must be one of {', '.join(TOOL_PARSERS)}")
        if "" in self.served_model_names:
            raise ValueError("served_model_names='': a name must not be empty")
        for origin in self.allowed_origins:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"allowed_origins={origin!r}: must be scheme://host or scheme://host:port, or *")


@dataclass(slots=True)
class Service:
    """What the routes need: the engine and the settings. One per application, at ``request.app.state.service``."""

    engine: AsyncLLM
    settings: Settings = field(default_factory=Settings)
    is_closing: bool = False
    created: int = field(default_factory=lambda: int(time.time()))  # Unix time
    answering: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="answers"))
    receiving: set[asyncio.Timeout] = field(default_factory=set)  # for bodies that have not arrived completely

    def __post_init__(self) -> None:
        markers = [END] if self.engine.reasoning_parser is not None else []
        if self.settings.tool_call_parser == "hermes":
            markers += [HermesParser.START, HermesParser.END]
        for marker in markers:
            if self.engine.tokenizer is not None and marker in self.engine.tokenizer.special_tokens:
                raise ValueError(f"{marker} is a special token of this tokenizer, so no text of an answer contains it")

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.settings.served_model_names or (self.engine.name,)

    def check_model(self, name: str | None) -> str:
        """The model's name in the answer. Raises APIError 404 for a model that is not served."""
        if name is not None and name not in self.model_names:
            known = ", ".join(self.model_names)
            message = f"model={name!r} is not served; served: {known}"
            raise APIError(404, message, param="model", code="model_not_found")
        return name or self.model_names[0]

    def stop_receiving(self) -> None:
        """Stop waiting for bodies that have not arrived completely. Call in the event loop."""
        for timeout in self.receiving:
            timeout.reschedule(0)

    async def open(
        self,
        prompts: ReadOnlyList[Prompt],
        params: Params,
        label: str,
        *,
        stream: bool,
        cache_salt: str | None,
        priority: int | None,
        prompt_field: str = "prompt",
    ) -> list[RequestStream]:
        """Queue all of the prompts, or none. The caller must close the streams."""
        num_each = params.beam_width if isinstance(params, BeamSearchParams) else params.n
        if num_each > self.settings.max_n:
            raise APIError(400, f"n={num_each}: must be at most max_n={self.settings.max_n}", param="n")
        if (len(prompts) - 1) * num_each >= self.engine.max_num_waiting:  # not even an empty queue has room
            message = (
                f"{len(prompts)} prompts with n={num_each} can never fit max_num_waiting={self.engine.max_num_waiting}"
            )
            raise APIError(400, message, param=prompt_field)
        self._check_num_logprobs(prompts, params)
        opened: list[RequestStream] = []
        try:
            for index, prompt in enumerate(prompts):
                if index % PROMPTS_PER_TURN == PROMPTS_PER_TURN - 1:
                    await asyncio.sleep(0)  # let other tasks run
                one = f"{label}-{index}"
                opened.append(
                    await self.engine.submit(
                        prompt, params, one, stream=stream, cache_salt=cache_salt, priority=priority or 0
                    )
                )
        except BaseException as error:
            close_all(opened)
            raise self.to_api_error(error, prompt_field) from error
        return opened

    def _check_num_logprobs(self, prompts: ReadOnlyList[Prompt], params: Params) -> None:
        """Raises APIError 400 if there could be too many. A text counts as one token per character."""
        if isinstance(params, BeamSearchParams):
            return
        longest, most = self.engine.max_model_len, 0
        if params.logprobs is not None:
            num_tokens = longest if params.max_tokens is None else min(params.max_tokens, longest)
            most += len(prompts) * num_tokens * (params.logprobs + 1)
        if params.prompt_logprobs is not None:
            num_tokens = sum(min(len(prompt), longest) for prompt in prompts)
            most += num_tokens * (params.prompt_logprobs + 1)
        if (limit := self.settings.max_num_logprobs) < most * params.n:
            message = f"logprobs: there could be {most * params.n}, more than max_num_logprobs={limit}"
            raise APIError(400, message, param="logprobs")

    async def run_in_thread(self, is_heavy: bool, function: Callable[[], T]) -> T:
        """``function()``. A heavy one runs in the thread ``answering``, so that the event loop is not blocked."""
        if not is_heavy:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self.answering, function)

    def to_api_error(self, error: BaseException, prompt_field: str = "prompt") -> BaseException:
        """The APIError for an exception of the engine. Other exceptions are returned unchanged."""
        if isinstance(error, ContextLengthError):
            return bad_value(error, prompt_field, "context_length_exceeded")
        if isinstance(error, ValueError):
            return bad_value(error, prompt_field)
        if isinstance(error, QueueFullError):
            return APIError(429, f"the queue is full: {error}", headers={"Retry-After": str(RETRY_AFTER_S)})
        if isinstance(error, EngineDeadError):
            return closing_error() if self.is_closing else APIError(500, str(error), code="engine_dead")
        return error

    def checked(self, output: RequestOutput) -> RequestOutput:
        """The output. Raises APIError if it failed or was aborted: a partial answer must not look complete."""
        for one in output.outputs:
            if one.finish_reason == "error":
                logger.warning("%s", one.error)
                raise APIError(500, one.error or "the request failed", code="request_failed")
        if any(one.finish_reason == "abort" for one in output.outputs):
            raise (closing_error() if self.is_closing else APIError(500, "the request was aborted", code="aborted"))
        return output

    async def final_outputs(self, streams: ReadOnlyList[RequestStream]) -> list[RequestOutput]:
        """The final output of each stream."""
        try:
            return [self.checked([output async for output in stream][-1]) for stream in streams]
        except (EngineDeadError, ValueError) as error:  # a ValueError: rejected when it was queued
            raise self.to_api_error(error) from error
        finally:
            close_all(streams)


def new_id(prefix: str) -> tuple[str, str]:
    """A new id and its label.

    The id of a job is enough to read or delete its answer, so only its client gets it. The label is the first part of
    the id. It gives no access, and the engine, its events and its logs use only the label.
    """
    label = f"{prefix}-{secrets.token_hex(8)}"
    return f"{label}-{secrets.token_hex(16)}", label


def service_of(request: Request) -> Service:
    return request.app.state.service


def closing_error() -> APIError:
    return APIError(503, CLOSING, headers={"Connection": "close"})
