"""The first three baselines, on the same Decoder and Sampler as the engine and with the same outputs.

    naive    one request at a time, no cache: every step recomputes the whole sequence, O(S^2) work per token
    cached   one request at a time, a contiguous cache reserved at full length: O(S) work per token, wasted memory
    static   requests in one left-padded batch that starts and ends together: finished rows wait for the last

Each takes an ``LLM`` (whose decoder and tokenizer it uses, not its engine) or whatever ``LLM`` takes as a model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as ReadOnlyList
from pathlib import Path

import torch
from torch import Tensor

from paged_infer.cache.contiguous import ContiguousCache
from paged_infer.cache.none import NoCache
from paged_infer.control.sequence import Sequence
from paged_infer.control.sequence_state import SequenceState
from paged_infer.control.step_entries import sampling_row
from paged_infer.engine.kv_usage import KVUsage
from paged_infer.engine.prompts import Prompt
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.llm import LLM
from paged_infer.outputs import RequestOutput, TokenLogprobs
from paged_infer.params import SamplingParams
from paged_infer.sampling.logprobs import token_logprobs
from paged_infer.sampling.sampler import CANNOT_SAMPLE, Sampler
from paged_infer.suggestions import checks_keywords
from paged_infer.text.output_processor import OutputProcessor, named_logprobs, request_output

Prompts = Prompt | ReadOnlyList[Prompt]
Params = SamplingParams | ReadOnlyList[SamplingParams] | None


@checks_keywords
def generate_naive(
    model_or_llm: LLM | str | Path | None,
    prompts: Prompts,
    sampling_params: Params = None,
    *,
    usage: KVUsage | None = None,
) -> list[RequestOutput]:
    """No cache, one sequence at a time. Arguments and outputs as ``LLM.generate``; no KV memory is held."""
    batch = _Batch(model_or_llm, prompts, sampling_params, usage)
    for sequence in batch.sequences:
        batch.run_naive(sequence)
    return batch.outputs()


@checks_keywords
def generate_cached(
    model_or_llm: LLM | str | Path | None,
    prompts: Prompts,
    sampling_params: Params = None,
    *,
    usage: KVUsage | None = None,
) -> list[RequestOutput]:
    """A contiguous cache, one sequence at a time. Arguments and outputs as ``LLM.generate``.

    ``usage``, if given, is filled with the KV slots reserved and the tokens that they hold, step by step.
    """
    batch = _Batch(model_or_llm, prompts, sampling_params, usage)
    for sequence in batch.sequences:
        batch.run_together([sequence])
    return batch.outputs()


@checks_keywords
def generate_static(
    model_or_llm: LLM | str | Path | None,
    prompts: Prompts,
    sampling_params: Params = None,
    *,
    batch_size: int | None = None,
    usage: KVUsage | None = None,
) -> list[RequestOutput]:
    """Left-padded batches of ``batch_size`` sequences (None: all in one). Otherwise as ``generate_cached``."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    batch = _Batch(model_or_llm, prompts, sampling_params, usage)
    size = batch_size or max(1, len(batch.sequences))
    for first in range(0, len(batch.sequences), size):
        batch.run_together(batch.sequences[first : first + size])
    return batch.outputs()


class _Batch:
    """The requests of one call, and the two ways to run their sequences without the engine."""

    def __init__(
        self, model_or_llm: LLM | str | Path | None, prompts: Prompts, params: Params, usage: KVUsage | None
    ) -> None:
        llm = model_or_llm if isinstance(model_or_llm, LLM) else LLM(model_or_llm)
        if (kind := llm.engine.config.kv_cache_dtype) != "auto":
            raise ValueError(f"kv_cache_dtype={kind!r}: the baselines store no keys in 8 bits, only LLM.generate does")
        self.engine = llm.engine
        self.decoder = llm.engine.decoder
        self.sampler = Sampler()
        self.usage = usage or KVUsage()
        self.requests = llm.prepare(prompts, params)
        self.sequences = [sequence for request in self.requests for sequence in request.sequences]
        self._request_of = {s.sequence_id: request for request in self.requests for s in request.sequences}
        self._completion_of = {s.sequence_id: OutputProcessor(s, llm.tokenizer, streamed=False) for s in self.sequences}
        self._prompt_logprobs: dict[str, list[TokenLogprobs | None]] = {}
        self._failed: set[str] = set()  # requests whose prompt has no logprobs

    @torch.inference_mode()
    def run_naive(self, sequence: Sequence) -> None:
        cache = NoCache(self.decoder.kv_spec())
        sequence.transition_to(SequenceState.RUNNING)
        while not sequence.is_finished:
            length = sequence.num_tokens
            hidden = self.decoder(self._tensor(sequence.token_ids), cache, self._step(range(length), length, 1))
            self._keep_prompt_logprobs(sequence, hidden)
            self._draw([sequence], self.decoder.logits(hidden[-1:]))

    @torch.inference_mode()
    def run_together(self, sequences: list[Sequence]) -> None:
        batch, width = len(sequences), max(s.num_tokens for s in sequences)
        pad_lens = [width - s.num_tokens for s in sequences]
        longest = max(pad + s.max_total_tokens for pad, s in zip(pad_lens, sequences, strict=True))
        max_len = max(self.engine.memory.max_model_len, longest)
        cache = ContiguousCache(self.decoder.kv_spec(), max_len, pad_lens, self.decoder.device)
        for sequence in sequences:
            sequence.transition_to(SequenceState.RUNNING)

        columns = range(width)  # the first step computes the prompts, the others one token per row
        token_ids = [t for s, pad in zip(sequences, pad_lens, strict=True) for t in [0] * pad + s.token_ids]
        while not all(s.is_finished for s in sequences):
            positions = [  # a finished row stays at its last position: the model may have no further one
                min(max(0, column - pad), s.max_total_tokens - 1)
                for s, pad in zip(sequences, pad_lens, strict=True)
                for column in columns
            ]
            step = self._step(positions, columns.stop, batch)
            hidden = self.decoder(self._tensor(token_ids), cache, step).view(batch, len(columns), -1)
            logits = self.decoder.logits(hidden[:, -1])  # of every row, finished ones included
            growing = [row for row, s in enumerate(sequences) if not s.is_finished]
            if len(columns) > 1 or width == 1:
                for row in growing:
                    self._keep_prompt_logprobs(sequences[row], hidden[row, pad_lens[row] :])
            self.usage.record(batch * max_len, sum(sequences[row].num_tokens for row in growing))
            self._draw([sequences[row] for row in growing], logits[growing])
            columns = range(columns.stop, columns.stop + 1)
            token_ids = [s.token_ids[-1] for s in sequences]

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> None:
        """One more token for each of the sequences, from logits [len(sequences), vocab]."""
        sampled = self.sampler(logits, [sampling_row(s) for s in sequences])
        now = time.perf_counter()
        for sequence, token_id, logprobs in zip(sequences, sampled.token_ids, sampled.logprobs, strict=True):
            request = self._request_of[sequence.sequence_id]
            if token_id < 0 or request.request_id in self._failed:
                sequence.error = CANNOT_SAMPLE
                sequence.finish("error")
                request.finished_time_s = now if request.is_finished else None
                continue
            ended = sequence.append_output_token(token_id)
            if ended is not None:
                sequence.finish(*ended)
            stop = self._completion_of[sequence.sequence_id].advance(() if logprobs is None else [logprobs])
            if stop is not None and not sequence.is_finished:
                sequence.finish("stop", stop)
            request.first_token_time_s = request.first_token_time_s or now
            request.finished_time_s = now if request.is_finished else None

    def _keep_prompt_logprobs(self, sequence: Sequence, hidden: Tensor) -> None:
        """From hidden states of the prompt (and perhaps more), [>= num_prompt_tokens, hidden]; once per request."""
        request = self._request_of[sequence.sequence_id]
        num_top = sequence.params.prompt_logprobs
        if num_top is None or request.request_id in self._prompt_logprobs:
            return
        targets = request.prompt_token_ids[1:]
        logits = self.decoder.logits(hidden[: len(targets)])
        entries = token_logprobs(logits, targets, [num_top] * len(targets)) if targets else []
        if None in entries:
            self._failed.add(request.request_id)
        named = [named_logprobs(entry, self.engine.tokenizer) for entry in entries if entry is not None]
        self._prompt_logprobs[request.request_id] = [None, *named]

    def _step(self, positions: ReadOnlyList[int], end: int, batch: int) -> AttentionMetadata:
        """A step of ``batch`` rows of equal length that ends before column ``end``; nothing is paged here."""
        return AttentionMetadata.unpaged(self._tensor(positions), batch=batch, end=end)

    def _tensor(self, values: ReadOnlyList[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.decoder.device)

    def outputs(self) -> list[RequestOutput]:
        return [
            request_output(
                request,
                [self._completion_of[s.sequence_id] for s in request.sequences],
                self._prompt_logprobs.get(request.request_id),
            )
            for request in self.requests
        ]
