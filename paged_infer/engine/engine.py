"""LLMEngine: requests in, outputs out, one step at a time.

InputProcessor.process
    -> [Scheduler.schedule -> Executor.launch -> Scheduler.advance, settle -> OutputProcessor.advance]
    -> outputs
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Unpack, cast

import torch

from paged_infer.config import EngineConfig, EngineOptions, lists_options
from paged_infer.control.request import Request
from paged_infer.control.step import ScheduledStep, StepResult
from paged_infer.engine.build import build_parts
from paged_infer.engine.defer_sigint import defer_sigint, interruptible
from paged_infer.engine.input_processor import InputProcessor, Params
from paged_infer.engine.kv_usage import KVUsage, stats_of
from paged_infer.engine.prompts import Prompt
from paged_infer.engine.request_states import RequestStates, StepReport
from paged_infer.engine.sequence_view import SequenceView
from paged_infer.execution.executor import InProcessExecutor, RemoteStep, RunningStep
from paged_infer.execution.loaded_models import dtype_of
from paged_infer.kernels.attention_backends import BackendChoice, backend_choice
from paged_infer.model.decoder import Decoder
from paged_infer.model.loading.hub import name_of, resolve_model
from paged_infer.outputs import RequestOutput
from paged_infer.params import SamplingParams


class LLMEngine:
    """One model, one paged cache, any number of requests. Not thread-safe: one caller steps it.

    >>> engine = LLMEngine()
    >>> engine.add_request("a", "Once upon a time", SamplingParams(max_tokens=20))
    >>> while engine.has_unfinished_requests:                                       # doctest: +SKIP
    ...     for output in engine.step().outputs:
    ...         print(output.outputs[0].text)

    Args:
        model: see ``LLM``.
        config: the options as an ``EngineConfig``; or
        options: the options by name; see ``help(paged_infer.config.EngineConfig)``.

    Raises:
        TypeError: an unknown option, or both a config and options.
        ValueError: a model or an option that cannot be used; the message names the value and the limit.
    """

    @lists_options
    def __init__(
        self, model: str | Path | None = None, config: EngineConfig | None = None, **options: Unpack[EngineOptions]
    ) -> None:
        if config is not None and options:
            raise TypeError(f"{', '.join(options)} and a config: pass either options or a config")
        self.config = config = EngineConfig.from_options(**options) if config is None else config
        model = "storyteller" if model is None else model
        self.folder = resolve_model(model)
        self.name = name_of(
            model, self.folder
        )  # a bundled model's, the hub id that was given, or its folder's or file's
        self.tokenizer, self.model_config, self.memory, self.executor, self.scheduler = build_parts(self.folder, config)
        self.manager = self.scheduler.manager
        self.usage = KVUsage()
        self.input_processor = InputProcessor(
            self.tokenizer,
            config,
            self.model_config,
            self.memory,
            self.manager,
            self.executor.now,
            is_sent=not isinstance(self.executor, InProcessExecutor),
        )
        by_default = self.device.type == "cuda" and config.speculation is None
        self._async_scheduling = by_default if config.async_scheduling is None else config.async_scheduling
        self._running: tuple[ScheduledStep, RunningStep] | None = None  # launched, its result not yet read
        self.requests = RequestStates(self.scheduler, self.tokenizer)

    def __repr__(self) -> str:
        return f"<LLMEngine {self.summary}>"

    @property
    def summary(self) -> str:
        """One line: the model, its dtype and device, the attention backend, the pool."""
        dtype = dtype_of(self.config.dtype, self.folder, self.device)
        pool = f"{self.memory.num_blocks:,} blocks of {self.memory.block_size} tokens"
        return (
            f"{self.name!r} ({self.model_config.family}), {str(dtype).removeprefix('torch.')} on {self.device}, "
            f"attention_backend={self.attention_backend.name!r}, {pool}"
        )

    @property
    def attention_backend(self) -> BackendChoice:
        """The backend that computes attention, and, if "auto" took a slow one, the reason."""
        return backend_choice(self.config.attention_backend, self.device, self.model_config.head_dim)

    @property
    def decoder(self) -> Decoder:
        """The model, for code that runs it outside of steps: baselines, benchmarks. Errors as ``in_process``."""
        return self.in_process.runner.decoder

    @property
    def in_process(self) -> InProcessExecutor:
        """The executor, for code that needs the model in this process.

        Raises:
            ValueError: the model is in other processes.
        """
        if not isinstance(self.executor, InProcessExecutor):
            raise ValueError(
                f"tensor_parallel_size={self.config.tensor_parallel_size}: the model is in other processes, where it "
                "only generates; code that runs it in this one needs tensor_parallel_size=1"
            )
        return self.executor

    @property
    def device(self) -> torch.device:
        return self.executor.device

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.requests.by_id)

    # -- requests ---------------------------------------------------------------------------------------------------

    def prepare(
        self, request_id: str, prompt: Prompt, params: Params, *, cache_salt: str | None = None, priority: int = 0
    ) -> Request:
        """Check and tokenize a request without queueing it.

        Requests share cached blocks only with those of the same ``cache_salt``, so that the latency of one tenant's
        requests reveals nothing about another's prompts. A lower ``priority`` is more urgent, if the policy reads it.

        Raises:
            ValueError: the request could not be served; the message names the value and the limit.
        """
        return self.input_processor.process(request_id, prompt, params, cache_salt, priority)

    def check_length(self, num_characters: int) -> None:
        """See ``InputProcessor.check_length``."""
        self.input_processor.check_length(num_characters)

    @defer_sigint()
    def submit(self, request: Request, *, streamed: bool = False) -> None:
        """Queue a prepared request. A streamed one is reported after every step, others when they finish.

        Raises:
            ValueError: the request id is in use; a beam search is streamed, although its text may change until it
                ends; or the tokens of the prompt cannot be decoded.
        """
        if streamed and request.beam_params is not None:
            raise ValueError("a beam search cannot be streamed: its beams change until it ends")
        if request.request_id in self.requests.by_id:
            raise ValueError(f"request_id={request.request_id!r} is already being served")
        self.input_processor.attach_matchers(request)
        self.requests.add(request, streamed)
        self.scheduler.add(request.sequences, request.beam_params)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: Params | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        streamed: bool = False,
    ) -> None:
        """Check, tokenize and queue; see ``prepare`` and ``submit``. None: ``SamplingParams()``."""
        params = SamplingParams() if params is None else params
        request = self.prepare(request_id, prompt, params, cache_salt=cache_salt, priority=priority)
        self.submit(request, streamed=streamed)

    def serves(self, request: Request) -> bool:
        """Whether this request, and not another with the same id, is unfinished."""
        state = self.requests.by_id.get(request.request_id)
        return state is not None and state.request is request

    @defer_sigint()
    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request immediately, whatever its state, and free its blocks. None if it is unknown or has finished."""
        return self.requests.abort(request_id)

    # -- one step ---------------------------------------------------------------------------------------------------

    @defer_sigint()
    def step(self, sleep: Callable[[float], object] = time.sleep) -> StepReport:
        """Run one step, and report what it changed.

        With ``async_scheduling`` the report is of the previous step: the one that this call plans and launches is still
        in flight when it returns. While the policy waits for a batch to fill, this calls ``sleep(seconds)``, which may
        return early.
        """
        report = StepReport()
        before, self._running = self._running, None
        try:
            launched, result = self._launch(sleep)
            if before is not None:
                self._settle(before[0], self._result(before[1]), report)
            if launched is not None and result is not None:
                self._settle(launched[0], result, report)
            else:
                self._running = launched
        except BaseException:
            self.scheduler.roll_back()
            raise
        report.now = time.perf_counter()
        return report

    def _launch(
        self, sleep: Callable[[float], object]
    ) -> tuple[tuple[ScheduledStep, RunningStep] | None, StepResult | None]:
        """Plan a step and launch it, if any sequence can run. Wait for its result if the next plan depends on it."""
        if not self.scheduler.has_work:
            return None, None
        now = self.executor.now()
        step = self.scheduler.schedule(now)
        if not step.sequences:
            if step.resume_at_s is not None:
                with interruptible():
                    sleep(max(0.0, step.resume_at_s - now))
            elif not self.scheduler.has_step_in_flight:
                raise RuntimeError(
                    "requests are waiting and none can run: one was admitted that does not fit in the pool"
                )
            return None, None
        is_local = isinstance(self.executor, InProcessExecutor)
        with interruptible() if is_local else nullcontext():  # see RemoteStep
            running = self.executor.launch(step)
        result = None if self._async_scheduling and step.allows_async_scheduling else self._result(running)
        self._record_usage(step)
        self.scheduler.advance(step)
        return (step, running), result

    def _result(self, running: RunningStep) -> StepResult:
        if isinstance(self.executor, InProcessExecutor):
            with interruptible():
                return running.result()
        remote = cast(RemoteStep, running)
        remote.request()
        with interruptible():
            remote.wait()
        return remote.result()

    def _settle(self, step: ScheduledStep, result: StepResult, report: StepReport) -> None:
        """Append a step's tokens to their sequences, decode them, and add what changed to ``report``."""
        now = time.perf_counter()
        grown = self.scheduler.settle(step, result, now)
        self.requests.record(grown, result, now, report)

    def _record_usage(self, step: ScheduledStep) -> None:
        """Record what is held during the step, before the sequences that end with it free their blocks."""
        pool, block_size = self.manager.pool, self.memory.block_size
        stored = self.scheduler.num_stored_tokens(step)
        self.usage.record(pool.num_used * block_size, stored, pool.num_references * block_size)

    # -- other processes --------------------------------------------------------------------------------------------

    def check_alive(self) -> None:
        """Raises EngineDeadError if a rank has ended: no step can be computed."""
        self.executor.check_alive()

    def shutdown(self) -> None:
        """End the processes of other ranks. A step that waits for them fails. May be called from any thread."""
        self.executor.close()

    # -- looking inside ---------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int | float]:
        """Counts since the engine was created, and the current state of its queues and blocks."""
        return {**stats_of(self.scheduler, self.memory, self.usage), **self.executor.traffic.stats()}

    def inspect(self, request_id: str, sample_index: int = 0) -> SequenceView:
        """Look into an unfinished request between two steps: its blocks, keys, values, logits, attention weights.

        Raises:
            ValueError: no such request is being served, it has no such sample, or the model is in other processes.
        """
        runner = self.in_process.runner
        return SequenceView(self.requests.sequence(request_id, sample_index), self.manager, runner)

    def reset_stats(self) -> None:
        """Restart the measurement of ``peak_kv_bytes``, ``kv_fill`` and ``sharing_saved``."""
        self.usage = KVUsage()

    def check_integrity(self) -> None:
        """Raises RuntimeError if law 2 (nothing leaks, nothing is shared by accident) does not hold right now."""
        self.scheduler.check_integrity()
        if not self.requests.by_id and self.manager.pool.num_used:
            raise RuntimeError(f"no request is unfinished, but {self.manager.pool.num_used} blocks are held")
