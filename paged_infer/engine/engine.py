"""LLMEngine: requests in, outputs out, one step at a time.

InputProcessor.process
    -> [Scheduler.schedule -> Executor.launch -> Scheduler.advance, settle -> OutputProcessor.advance]
    -> outputs
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as ReadOnlyList
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import torch

from paged_infer.config import EngineConfig
from paged_infer.control.request import Request
from paged_infer.control.sequence import Sequence
from paged_infer.control.step import ScheduledStep, StepResult
from paged_infer.engine.build import build_parts
from paged_infer.engine.defer_sigint import defer_sigint, interruptible
from paged_infer.engine.input_processor import InputProcessor, Params, Prompt
from paged_infer.engine.kv_usage import KVUsage
from paged_infer.execution.executor import InProcessExecutor, RemoteStep, RunningStep
from paged_infer.model.decoder import Decoder
from paged_infer.outputs import RequestOutput, TokenLogprobs
from paged_infer.text.output_processor import OutputProcessor, named_logprobs, request_output

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _RequestState:
    """An unfinished request and what its caller will get."""

    request: Request
    completions: list[OutputProcessor]
    streamed: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = field(default=None)


@dataclass(slots=True)
class StepReport:
    """What one step changed.

    Attributes:
        outputs: of requests that finished (or were aborted, for an observer), and of streamed ones with a new token.
        grown: the sequences that got a token, once for each token.
        now: when the step ended, in ``time.perf_counter`` seconds.
        replica: which engine it was, where there are several (``engine.replicas``).
    """

    outputs: list[RequestOutput] = field(default_factory=list)
    grown: list[Sequence] = field(default_factory=list)
    now: float = 0.0
    replica: int = 0


class LLMEngine:
    """One model, one paged cache, any number of requests. Not thread-safe: one caller steps it."""

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        """See ``build_parts``, errors included."""
        self.config = config
        self.tokenizer, self.model_config, self.memory, self.executor, self.scheduler = build_parts(folder, config)
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
        self._request_states: dict[str, _RequestState] = {}

    @property
    def decoder(self) -> Decoder:
        """The model, for code that runs it outside of steps: baselines, benches. Errors as ``in_process``."""
        return self.in_process.runner.decoder

    @property
    def in_process(self) -> InProcessExecutor:
        """The executor, for code that needs the model in this process.

        Raises:
            ValueError: it is in others.
        """
        if not isinstance(self.executor, InProcessExecutor):
            raise ValueError(
                f"tensor_parallel_size={self.config.tensor_parallel_size}: the model is in other processes, and only "
                "generates; what runs it in this one needs tensor_parallel_size=1"
            )
        return self.executor

    @property
    def device(self) -> torch.device:
        return self.executor.device

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._request_states)

    # -- requests ---------------------------------------------------------------------------------------------------

    def prepare(self, request_id: str, prompt: Prompt, params: Params, *, cache_salt: str | None = None) -> Request:
        """Check and tokenize a request without queueing it.

        Requests share cached blocks only with those of the same ``cache_salt``, so that the latency of one tenant's
        requests reveals nothing about another's prompts.

        Raises:
            ValueError: the request could not be served; the message names the value and the limit.
        """
        return self.input_processor.process(request_id, prompt, params, cache_salt)

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
        if request.request_id in self._request_states:
            raise ValueError(f"request_id={request.request_id!r} is already being served")
        self.input_processor.attach_matchers(request)
        try:
            completions = [OutputProcessor(s, self.tokenizer, streamed) for s in request.sequences]
        except Exception as error:  # a tokenizer can raise anything
            raise ValueError(f"the prompt {_decoding_error(error)}") from error
        state = _RequestState(request, completions, streamed)
        if request.params.prompt_logprobs is not None:
            state.prompt_logprobs = [None] * len(request.prompt_token_ids)
        self._request_states[request.request_id] = state
        self.scheduler.add(request.sequences, request.beam_params)

    def add_request(
        self, request_id: str, prompt: Prompt, params: Params, *, cache_salt: str | None = None, streamed: bool = False
    ) -> None:
        """Check, tokenize and queue; see ``prepare`` and ``submit``."""
        self.submit(self.prepare(request_id, prompt, params, cache_salt=cache_salt), streamed=streamed)

    def serves(self, request: Request) -> bool:
        """Whether this request, and not another with the same id, is unfinished."""
        state = self._request_states.get(request.request_id)
        return state is not None and state.request is request

    @defer_sigint()
    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request immediately, whatever its state, and free its blocks. None if it is unknown or has finished."""
        state = self._request_states.pop(request_id, None)
        if state is None:
            return None
        for sequence in state.request.sequences:
            self.scheduler.finish(sequence, "abort")
        state.request.finished_time_s = time.perf_counter()
        return self._output(state)

    # -- one step ---------------------------------------------------------------------------------------------------

    @defer_sigint()
    def step(self, sleep: Callable[[float], object] = time.sleep) -> StepReport:
        """Run one step, and report what it changed.

        With ``async_scheduling`` the report is of the previous step: the one that this call plans and launches is still
        in flight then. While the policy waits for a batch to fill, this calls
        ``sleep(seconds)``, which may return early.
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
        changed: dict[str, _RequestState] = {}
        if result.prompt_logprobs:
            self._keep_prompt_logprobs(result)
        if result.failed or result.prompt_logprobs:
            changed = {i: state for i, state in self._request_states.items() if state.request.error is not None}
        for sequence, num_new in Counter(grown).items():
            state = self._request_states[sequence.request_id]
            if state.request.first_token_time_s is None:
                state.request.first_token_time_s = now
            num_before = sequence.num_output_tokens - num_new
            with self._decoding(sequence):
                self._advance(state, sequence, result.logprobs.get(sequence.sequence_id, ()), num_new)
            report.grown += [sequence] * (sequence.num_output_tokens - num_before)
            state.request.note_reasoning(sequence, now)
            if state.streamed or sequence.is_finished:
                changed[sequence.request_id] = state
        report.outputs += [output for state in changed.values() if (output := self._reported(state, now)) is not None]

    @contextmanager
    def _decoding(self, sequence: Sequence) -> Iterator[None]:
        """An error in decoding ends only the request of ``sequence``."""
        try:
            yield
        except Exception as error:  # a tokenizer can raise anything
            logger.exception("the tokens of request %s could not be decoded", sequence.request_id)
            self.scheduler.fail(sequence, f"its tokens {_decoding_error(error)}")

    def _advance(
        self, state: _RequestState, sequence: Sequence, logprobs: ReadOnlyList[TokenLogprobs], num_new: int
    ) -> None:
        """Decode the sequence's newest tokens to text."""
        stop = state.completions[sequence.sample_index].advance(logprobs, num_new)
        if stop is not None:
            self.scheduler.finish(sequence, "stop", stop)

    def _reported(self, state: _RequestState, now: float) -> RequestOutput | None:
        if state.request.is_finished:
            state.request.finished_time_s = now
            del self._request_states[state.request.request_id]
        elif not state.streamed:
            return None
        return self._output(state)

    def _keep_prompt_logprobs(self, result: StepResult) -> None:
        for state in self._request_states.values():
            sequence = state.request.sequences[0]
            report = result.prompt_logprobs.get(sequence.sequence_id)
            if report is not None and state.prompt_logprobs is not None:
                first, entries = report
                with self._decoding(sequence):
                    state.prompt_logprobs[first : first + len(entries)] = [
                        named_logprobs(entry, self.tokenizer) for entry in entries
                    ]

    def _record_usage(self, step: ScheduledStep) -> None:
        """Record what is held during the step, before the sequences that end with it free their blocks."""
        pool, block_size = self.manager.pool, self.memory.block_size
        stored = self.scheduler.num_stored_tokens(step)
        self.usage.record(pool.num_used * block_size, stored, pool.num_references * block_size)

    def _output(self, state: _RequestState) -> RequestOutput:
        """The request's output so far. If its tokens cannot be decoded, it fails with the text decoded until then."""
        try:
            return request_output(state.request, state.completions, state.prompt_logprobs)
        except Exception as error:  # a tokenizer can raise anything
            logger.exception("the tokens of request %s could not be decoded", state.request.request_id)
            self.scheduler.fail(
                state.request.sequences[0], f"its tokens {_decoding_error(error)}", include_finished=True
            )
            self._request_states.pop(state.request.request_id, None)
            state.request.finished_time_s = state.request.finished_time_s or time.perf_counter()
            for completion in state.completions:
                completion.is_broken = True
            return request_output(state.request, state.completions, state.prompt_logprobs)

    # -- other processes --------------------------------------------------------------------------------------------

    def check_alive(self) -> None:
        """Raises EngineDeadError if a rank has ended: no step can be computed."""
        self.executor.check_alive()

    def shutdown(self) -> None:
        """From any thread: end the processes of other ranks. A step that waits for them fails."""
        self.executor.close()

    # -- looking inside ---------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int | float]:
        """Counts since the engine was created, and the current state of its queues and blocks."""
        return {
            **asdict(self.scheduler.stats),
            "acceptance_rate": self.scheduler.stats.acceptance_rate,
            "evictions": self.manager.pool.num_evictions,
            "num_waiting": len(self.scheduler.waiting),
            "num_swapped": len(self.scheduler.swapped),
            "num_running": len(self.scheduler.running),
            "num_blocks": self.memory.num_blocks,
            "free_blocks": self.manager.pool.num_free,
            "peak_kv_bytes": self.usage.peak_slots * self.memory.kv_bytes_per_token,
            "kv_fill": self.usage.fill,
            "sharing_saved": self.usage.sharing_saved,
        }

    def reset_stats(self) -> None:
        """Restart the measurement of ``peak_kv_bytes``, ``kv_fill`` and ``sharing_saved``."""
        self.usage = KVUsage()

    def check_integrity(self) -> None:
        """Raises RuntimeError if law 2 (nothing leaks, nothing is shared by accident) does not hold right now."""
        self.scheduler.check_integrity()
        if not self._request_states and self.manager.pool.num_used:
            raise RuntimeError(f"no request is unfinished, but {self.manager.pool.num_used} blocks are held")


def _decoding_error(error: Exception) -> str:
    return f"could not be decoded: {type(error).__name__}: {error}"
