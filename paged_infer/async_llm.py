"""AsyncLLM: one engine, any number of callers that await it.

async with AsyncLLM() as engine:
    async for output in engine.generate("Once upon a time", SamplingParams(max_tokens=64)):
        print(output.outputs[0].text)        # the whole text so far
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from collections.abc import Sequence as ReadOnlyList
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, Unpack

from paged_infer.config import EngineConfig, EngineOptions, check_names, lists_options
from paged_infer.control.trace import Trace
from paged_infer.engine.engine import LLMEngine
from paged_infer.engine.engine_client import EngineClient, QueueFullError
from paged_infer.engine.input_processor import Params
from paged_infer.engine.kv_usage import Stats, total_stats
from paged_infer.engine.model_info import ModelInfo
from paged_infer.engine.output_channel import OutputChannel, RequestStream
from paged_infer.engine.prompts import Prompt, plain_prompt
from paged_infer.engine.request_states import StepReport
from paged_infer.engine.serving_options import ServingOptions
from paged_infer.engine.start_engines import start_engines
from paged_infer.engine.text_queue import LONG_TEXT, TextQueue
from paged_infer.execution.errors import EngineDeadError
from paged_infer.outputs import RequestOutput
from paged_infer.params import BeamSearchParams, SamplingParams
from paged_infer.suggestions import checks_keywords

__all__ = ["AsyncLLM", "EngineDeadError", "QueueFullError", "RequestStream", "StepReport"]

LAST_STEP_S = 30.0
T = TypeVar("T")


class AsyncLLM(ModelInfo):
    """Generates for many callers at once: each awaits its own outputs, and one thread steps the engine for all.

    That thread is in this process, or in others that are spawned: then it must be possible to import the caller's main
    module without running it (``if __name__ == "__main__":``), and the sequences that ``observers`` get as ``grown``
    are those that were submitted, without their output.

    Args:
        model: as ``LLM`` takes it.
        max_num_waiting: the most sequences that may be waiting; another request then raises ``QueueFullError``.
        step_timeout: the longest that one step may take, in seconds; the first step may include compilation. After
            that the device is considered hung, and every request ends with an ``EngineDeadError``. None: no limit.
        engine_process: run the engine in a process of its own.
        disaggregated_prefill: compute prompts in one engine and the tokens after them in another, each in a process of
            its own on the same devices; see ``engine.prefill_decode``.
        data_parallel_size: how many engines with these options serve the requests, each in a process of its own if
            there are several. On CUDA each gets its own devices, in order.
        data_parallel_backend: where they run: "mp" on this machine, "ray" on the nodes of a Ray cluster
            (``engine.ray_process``).
        data_parallel_routing: how requests are divided among them: "round_robin", "least_loaded" or "prefix"; see
            ``engine.routing``. None: "least_loaded".
        options: see ``help(paged_infer.config.EngineConfig)``.

    Raises:
        TypeError: an unknown option; the message lists the known ones.
        ValueError: a model or an option that cannot be used; the message names the value and the limit.
    """

    @lists_options
    def __init__(
        self,
        model: str | Path | None = None,
        *,
        max_num_waiting: int = 1024,
        step_timeout: float | None = 600.0,
        engine_process: bool = False,
        disaggregated_prefill: bool = False,
        data_parallel_size: int = 1,
        data_parallel_backend: str = "mp",
        data_parallel_routing: str | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        check_names(options, inspect.signature(AsyncLLM).parameters)
        own = ServingOptions(
            max_num_waiting, step_timeout, engine_process, disaggregated_prefill,
            data_parallel_size, data_parallel_backend, data_parallel_routing,
        )  # fmt: skip
        config = EngineConfig.from_options(**options)
        self._core, input_processor, name = start_engines(model, config, own)
        super().__init__(name, input_processor)
        self.max_num_waiting = own.max_num_waiting
        self._input_processor.warm_up()
        self._submit_lock = threading.Lock()  # requests are numbered and queued in the same order
        self._streams: dict[str, RequestStream] = {}  # unfinished ones; guarded by _submit_lock
        self._numbers = itertools.count()
        self._tokenizing = TextQueue(check=self._core.check_alive)
        self._finalizer = weakref.finalize(self, _stop, self._core, self._tokenizing)  # at exit, too

    @property
    def trace(self) -> Trace | None:
        """A record of every step, with ``trace=True``; otherwise None. Use ``run`` to read it between two steps."""
        return self._core.trace

    @property
    def error(self) -> EngineDeadError | None:
        """Why the engine has stopped; None while it runs."""
        return self._core.error

    @property
    def is_abandoned(self) -> bool:
        """Whether a step did not return and was abandoned. Its thread may run until the process ends."""
        return self._core.is_abandoned

    @property
    def observers(self) -> list[Callable[[StepReport], None]]:
        """Called on the engine's thread after every step and abort: must be fast. One that raises is removed."""
        return self._core.observers

    # -- requests ---------------------------------------------------------------------------------------------------

    @checks_keywords
    async def generate(
        self,
        prompt: Prompt,
        params: Params | None = None,
        request_id: str | None = None,
        *,
        stream: bool = True,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the whole output so far as it grows; the last one is ``finished``.

        Closing the generator, or cancelling the task that iterates over it, aborts the request and frees its blocks.

        Args:
            prompt: a text, token ids (a list, or a 1-D array or tensor of integers), or a dict with either; see
                ``engine.prompts``.
            params: ``SamplingParams``, or ``BeamSearchParams``: a beam search yields its final output only.
            request_id: must differ from that of every other unfinished request. None: the engine chooses one.
            stream: yield after every token (a slow reader skips some); False: only the final output, at less cost.
            cache_salt: share cached blocks only with requests of the same salt.
            priority: lower is more urgent; only with a policy that reads it.

        Raises:
            ValueError: the request cannot be served; the message names the value and the limit.
            QueueFullError: too many sequences are waiting, or too much text is waiting to be tokenized.
            EngineDeadError: the engine has failed, now or earlier, or has been shut down.
        """
        answers = await self.submit(prompt, params, request_id, stream=stream, cache_salt=cache_salt, priority=priority)
        try:
            async for output in answers:
                yield output
        finally:
            answers.close()

    async def submit(
        self,
        prompt: Prompt,
        params: Params | None = None,
        request_id: str | None = None,
        *,
        stream: bool = True,
        cache_salt: str | None = None,
        priority: int = 0,
    ) -> RequestStream:
        """Queue a request: what ``generate`` does before its first output, errors included.

        The caller must ``close`` the returned stream.
        """
        params = SamplingParams() if params is None else params
        prompt = plain_prompt(prompt)
        text = prompt if isinstance(prompt, str) else None
        if isinstance(prompt, str) and self.tokenizer is not None:
            if isinstance(params, BeamSearchParams) or params.truncate_prompt_tokens is None:
                self._input_processor.check_length(len(prompt))
            prompt = await self._tokenizing.run(self.tokenizer.encode, prompt, len(prompt))
        grammar, grammars = getattr(params, "structured_outputs", None), self._input_processor.grammars
        if grammar is not None and not grammars.holds(grammar):
            await self._tokenizing.run(grammars.get, grammar, LONG_TEXT + len(grammar.text))
        channel = OutputChannel(asyncio.get_running_loop())
        with self._submit_lock:
            if request_id is None:
                request_id = f"request-{next(self._numbers)}"
            if request_id in self._streams:
                raise ValueError(f"request_id={request_id!r} is already being served")
            request = self._input_processor.process(request_id, prompt, params, cache_salt, priority)
            request.prompt = text
            self._core.add(request, channel, stream and not isinstance(params, BeamSearchParams))
            answers = self._streams[request_id] = RequestStream(request_id, channel, self._closed)
        return answers

    async def chat_prompt(
        self,
        messages: ReadOnlyList[Mapping[str, Any]],
        *,
        tools: ReadOnlyList[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        truncates: bool = False,
    ) -> list[int]:
        """Token ids of a conversation formatted by the tokenizer's chat template, ready for the answer.

        Args:
            tools, chat_template_kwargs: see ``LLM.chat``.
            truncates: the request keeps only the end of its prompt, so no conversation is too long.

        Raises:
            ValueError: see ``Tokenizer.apply_chat_template``; or the user messages alone are too long for the context.
            QueueFullError: too much text is waiting to be tokenized.
        """
        if not truncates:
            self._input_processor.check_chat_length(messages)
        render = partial(self._input_processor.chat_prompt, tools=tools, chat_template_kwargs=chat_template_kwargs)
        num_characters = sum(len(str(one)) for one in [*messages, *(tools or ())])
        return await self._tokenizing.run(render, messages, num_characters)

    def abort(self, request_id: str) -> None:
        """End a request. Its reader gets the output so far, with finish_reason "abort". Thread-safe."""
        self._core.abort(request_id)

    def _closed(self, answers: RequestStream, has_ended: bool) -> None:
        with self._submit_lock:
            if self._streams.get(answers.request_id) is answers:
                del self._streams[answers.request_id]
            if not has_ended:  # before another request can take the id
                self._core.abort(answers.request_id)

    # -- looking inside ---------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """See ``LLMEngine.stats``. Read while the engine runs: its counts may be from different moments of a step.

        For several engines: the sums of their counts, and the means of their shares.
        """
        return total_stats(self.replica_stats())

    def replica_stats(self) -> list[Stats]:
        """``LLMEngine.stats`` of each engine; for one in another process, as of its last step."""
        return self._core.replica_stats()

    def health(self) -> list[dict[str, Any]]:
        """For several engines: the ``replica`` (its index), ``status`` and ``restarts`` of each.

        The status is "ready", "starting" (it is being replaced) or "dead" (given up).
        """
        return self._core.health()

    async def run(self, function: Callable[[LLMEngine], T], replica: int = 0) -> T:
        """``function(engine)``, called on the engine's thread between two steps, when no state changes.

        For another process, the function must be a module-level one, and its result must be picklable.
        """
        size = len(self.replica_stats())
        if not 0 <= replica < size:
            raise ValueError(f"replica={replica}: must be less than data_parallel_size={size}")
        return await asyncio.wrap_future(self._core.call(function, replica))

    async def check_integrity(self) -> None:
        """Raises RuntimeError if a block leaks or is shared by accident."""
        for replica in range(len(self.replica_stats())):
            await self.run(LLMEngine.check_integrity, replica)

    # -- shutdown ---------------------------------------------------------------------------------------------------

    async def shutdown(
        self, finish: bool = False, timeout_s: float | None = None, last_step_s: float = LAST_STEP_S
    ) -> None:
        """Accept no more requests; let the unfinished ones finish, for at most ``timeout_s``, or abort them now.

        Every request ends in either case. Returns when the engine's thread has ended, or when the current step has
        not returned after another ``last_step_s`` seconds; ``is_abandoned`` is then true.
        """
        self._core.stop(finish)
        if finish:
            await asyncio.to_thread(self._core.join, timeout_s)
        self._core.stop(finish=False)
        if not await asyncio.to_thread(self._core.join, last_step_s):
            self.abandon()
        self._tokenizing.close()

    def abandon(self) -> None:
        """Stop waiting for the current step. Unfinished requests end with an EngineDeadError. Thread-safe."""
        self._core.abandon("its last step did not return")

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown(finish=False)


def _stop(core: EngineClient, tokenizing: TextQueue) -> None:
    """At garbage collection or interpreter exit: stop the engine, but not in the middle of a step."""
    core.stop()
    core.join(LAST_STEP_S)
    tokenizing.close()
