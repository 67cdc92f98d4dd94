"""Turn a ScheduledStep into sampled tokens and beam candidates: pack, run the decoder, sample.

sequences   A: 1 token   B: 1 token   C: 3 tokens of its prompt, the last ones
token_ids       [ a9 | b4 | c0 c1 c2 ]          T = 5, no padding
hidden rows        0    1         4   -> logits [3, vocab] -> one new token for each of A, B, C
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from paged_infer.cache.paged import PagedCache
from paged_infer.control.sequence import PLACEHOLDER
from paged_infer.control.speculation import num_accepted, rows_after
from paged_infer.control.step import SamplingRow, ScheduledSequence, ScheduledStep, StepResult, TopKRow
from paged_infer.execution.cuda_graphs import DecodeGraphs
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.device import to_device
from paged_infer.model.decoder import Decoder
from paged_infer.outputs import TokenLogprobs
from paged_infer.sampling.beam_candidates import beam_candidates
from paged_infer.sampling.logprobs import logprobs_of, token_logprobs
from paged_infer.sampling.sampler import CANNOT_SAMPLE, AsyncTokens, Sampler, copy_to_host

_PROMPT_LOGITS_ROWS = 256  # a long prompt's logits over a large vocabulary are computed in slices


@dataclass(slots=True)
class RunningStep:
    """A step that has been launched. ``result`` waits until it has been computed."""

    step: ScheduledStep
    _known: StepResult
    _logits: Tensor | None  # [R, vocab], one row for each sampled token
    _sampling_rows: list[tuple[int, SamplingRow]]
    _sampled: AsyncTokens | None
    # (sequences, a flag for each of their tokens: whether its hidden state is finite)
    _checked: tuple[list[ScheduledSequence], AsyncTokens] | None = None
    # Each reads a further part of the result, for which the host waits.
    _reports: list[Callable[[StepResult], None]] = field(default_factory=list)

    @torch.inference_mode()
    def result(self) -> StepResult:
        """Wait for the sampled tokens and check them; read what else is reported."""
        for report in self._reports:
            report(self._known)
        if self._checked is not None:
            sequences, is_finite = self._checked
            flags = iter(is_finite.token_ids())
            for sequence in sequences:
                if not all(list(islice(flags, sequence.num_tokens))):
                    self._known.failed[sequence.sequence_id] = CANNOT_SAMPLE
        if self._sampled is not None and self._logits is not None:
            token_ids = self._sampled.token_ids()
            logprobs = logprobs_of(self._logits, [row for _, row in self._sampling_rows], token_ids)
            drafts = {s.sequence_id: s.drafts for s in self.step.sequences if s.num_drafts}
            first = 0
            while first < len(token_ids):
                sequence_id, _ = self._sampling_rows[first]
                end = first + 1 + len(drafts.get(sequence_id, ()))
                last = first  # of the samples that are kept
                if end > first + 1:
                    last += num_accepted(drafts[sequence_id], token_ids[first:end])
                    self._known.accepted[sequence_id] = token_ids[first:last]
                if token_ids[last] < 0:
                    mask = self._sampling_rows[last][1].mask
                    reason = self._sampled.errors.get(last) or (mask.error if mask is not None else None)
                    self._known.failed[sequence_id] = reason or CANNOT_SAMPLE
                self._known.token_ids[sequence_id] = token_ids[last]
                reports = [of_row for of_row in logprobs[first : last + 1] if of_row is not None]
                if reports:
                    self._known.logprobs[sequence_id] = reports
                first = end
        return self._known


class ModelRunner:
    """Runs scheduled steps on one decoder and its paged cache; decode steps by ``graphs``, if there are any."""

    def __init__(
        self, decoder: Decoder, cache: PagedCache, sampler: Sampler, graphs: DecodeGraphs | None = None
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.sampler = sampler
        self.graphs = graphs
        self._last_tokens: Tensor | None = None  # [R] sampled by the previous step, on the device
        self._last_rows: dict[int, int] = {}  # by sequence id: its row in _last_tokens

    def execute(self, step: ScheduledStep) -> StepResult:
        """Compute every scheduled token, and sample one for each sequence that needs one; see ``launch``."""
        return self.launch(step).result()

    @torch.inference_mode()
    def launch(self, step: ScheduledStep) -> RunningStep:
        """Launch the step on the device, which runs steps in order. On a CPU, this returns once it is computed.

        Pending tokens are read from what the previous step sampled, without leaving the device. The host waits for the
        device only to swap blocks out, and to see whether rows with top_k or top_p have too few candidates
        (``sampling.sampler``).
        """
        load = self.decoder.expert_load
        if load is None:
            return self._launch(step)
        load.zero_()
        running = self._launch(step)
        counted = copy_to_host(load, load[:, :-1].flatten())  # without the column of padding

        def report(result: StepResult) -> None:
            result.expert_load = torch.tensor(counted.token_ids()).view(len(load), -1).tolist()

        running._reports.append(report)
        return running

    def _launch(self, step: ScheduledStep) -> RunningStep:
        self.cache.move_blocks(step.transfers)
        # Single tokens first, as AttentionMetadata requires. Longest first: a GPU starts rows in order, so the last to
        # start are short ones, which fill its processors to the end; and batched products pad less where rows of
        # similar length are adjacent.
        sequences = sorted(step.sequences, key=lambda s: (s.num_tokens > 1, -s.num_computed_tokens - s.num_tokens))
        if self.graphs is not None and self.graphs.fits(step):
            return self._replay(step, sequences, self.graphs)
        token_ids, meta, ends = self._pack(sequences)
        hidden = self.decoder(token_ids, self.cache, meta)  # [T, hidden]
        running = self._sample(step, sequences, hidden, ends)
        self._rank(sequences, hidden, ends, running)
        for sequence, end in zip(sequences, ends, strict=True):
            if sequence.num_prompt_logprobs is not None:
                own = hidden[int(end) - sequence.num_tokens : int(end)]
                running._reports.append(partial(self._report_prompt, sequence, own))
        if meta.max_query_len > 1 or any(sequence.sample is None for sequence in sequences):
            # Not every row's logits are computed, and a block may be shared before its owner is sampled. A masked NaN
            # key reaches even earlier tokens: 0 * NaN is NaN.
            is_finite = hidden.sum(dim=1, dtype=torch.float32).isfinite()  # [T]
            running._checked = sequences, copy_to_host(is_finite, is_finite)
        return running

    def _pack(self, sequences: list[ScheduledSequence]) -> tuple[Tensor, AttentionMetadata, np.ndarray]:
        """Token ids [T], what attention needs, and where each sequence's tokens end, [B] on the host."""
        block_size = self.cache.block_size
        query_lens = np.fromiter((s.num_tokens for s in sequences), np.int64, len(sequences))
        starts = np.fromiter((s.num_computed_tokens for s in sequences), np.int64, len(sequences))
        query_start_loc = np.zeros(len(sequences) + 1, np.int32)
        query_start_loc[1:] = query_lens.cumsum()
        seq_lens = starts + query_lens

        tables = np.zeros((len(sequences), max(len(s.block_table) for s in sequences)), np.int32)  # [B, max_blocks]
        for row, sequence in enumerate(sequences):
            tables[row, : len(sequence.block_table)] = sequence.block_table

        rows = np.repeat(np.arange(len(sequences)), query_lens)  # [T] which sequence each token belongs to
        positions = np.arange(len(rows)) - query_start_loc[rows] + starts[rows]
        slots = tables[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size
        token_ids = np.fromiter((t for s in sequences for t in s.token_ids), np.int64, len(rows))

        meta = AttentionMetadata(
            positions=self._to_device(positions),
            slot_mapping=self._to_device(slots),
            query_start_loc=self._to_device(query_start_loc),
            seq_lens=self._to_device(seq_lens.astype(np.int32)),
            block_tables=self._to_device(tables),
            num_decodes=int((query_lens == 1).argmin()) if query_lens[-1] > 1 else len(sequences),
            max_query_len=int(query_lens.max()),
            max_seq_len=int(seq_lens.max()),
        )
        ends = query_start_loc[1:].astype(np.int64)
        return self._fill_in(self._to_device(token_ids), sequences, ends), meta, ends

    def _fill_in(self, token_ids: Tensor, sequences: list[ScheduledSequence], ends: np.ndarray) -> Tensor:
        """Replace pending tokens by what the previous step sampled: [T]."""
        pending = [row for row, sequence in enumerate(sequences) if sequence.token_ids[-1] == PLACEHOLDER]
        if pending and self._last_tokens is not None:
            rows = np.asarray([self._last_rows[sequences[row].sequence_id] for row in pending])
            # A failed row left -1. Its request ends, so any valid token will do here.
            token_ids[self._to_device(ends[pending] - 1)] = self._last_tokens[self._to_device(rows)].clamp_min(0)
        return token_ids

    def _to_device(self, array: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(array), self.decoder.device)

    def _replay(self, step: ScheduledStep, sequences: list[ScheduledSequence], graphs: DecodeGraphs) -> RunningStep:
        """Run a decode step as one launch. If its sampling kernel does not cover all rows, sample from its logits."""
        sampling_rows = [(s.sequence_id, s.sample) for s in sequences if isinstance(s.sample, SamplingRow)]
        logits, tokens = graphs.run(sequences, self._last_tokens, self._last_rows)
        rows = [row for _, row in sampling_rows]
        if graphs.has_sampler and self.sampler.is_kernel_enough(rows, logits.shape[1]):
            sampled = copy_to_host(tokens, tokens)
        else:
            sampled = self.sampler.sample(logits, rows)
        self._last_tokens = sampled.tokens
        self._last_rows = {sequence_id: row for row, (sequence_id, _) in enumerate(sampling_rows)}
        return RunningStep(step, StepResult(), logits, sampling_rows, sampled)

    def _sample(
        self, step: ScheduledStep, sequences: list[ScheduledSequence], hidden: Tensor, ends: np.ndarray
    ) -> RunningStep:
        sequence_of: list[int] = []  # the sequence of each sampled token; forks sample from the same logits
        num_after: list[int] = []  # how many of its tokens, all drafts, come after the one whose logits are sampled
        sampling_rows: list[tuple[int, SamplingRow]] = []
        for row, sequence in enumerate(sequences):
            if isinstance(sequence.sample, SamplingRow):
                rows = rows_after(sequence.sample, sequence.drafts) if sequence.num_drafts else (sequence.sample,)
                sampling_rows += [(sequence.sequence_id, own) for own in rows]
                sampling_rows += sequence.forks
                sequence_of += [row] * (len(rows) + len(sequence.forks))
                num_after += [*range(sequence.num_drafts, 0, -1), *[0] * (1 + len(sequence.forks))]
        self._last_rows = {sequence_id: row for row, (sequence_id, _) in enumerate(sampling_rows)}
        if not sampling_rows:
            return RunningStep(step, StepResult(), None, [], None)
        logits = self._logits(ends[sequence_of] - 1 - np.asarray(num_after), hidden)
        sampled = self.sampler.sample(logits, [row for _, row in sampling_rows])
        self._last_tokens = sampled.tokens
        return RunningStep(step, StepResult(), logits, sampling_rows, sampled)

    def _logits(self, tokens: np.ndarray, hidden: Tensor) -> Tensor:
        """Logits [R, V] after these of the step's tokens, [R].

        ``tokens`` is on the host and is copied without waiting. A list as the index of a CUDA tensor would wait for
        everything launched before.
        """
        if not np.array_equal(tokens, np.arange(hidden.shape[0])):
            hidden = hidden[self._to_device(tokens)]
        return self.decoder.logits(hidden)

    def _rank(self, sequences: list[ScheduledSequence], hidden: Tensor, ends: np.ndarray, running: RunningStep) -> None:
        asking = {row: s.sample for row, s in enumerate(sequences) if isinstance(s.sample, TopKRow)}
        if not asking:
            return
        logits = self._logits(ends[[*asking]] - 1, hidden)

        def report(result: StepResult) -> None:
            for row, candidates in zip(asking, beam_candidates(logits, [*asking.values()]), strict=True):
                if candidates is None:
                    result.failed[sequences[row].sequence_id] = CANNOT_SAMPLE
                else:
                    result.candidates[sequences[row].sequence_id] = candidates

        running._reports.append(report)

    def _report_prompt(self, sequence: ScheduledSequence, hidden: Tensor, result: StepResult) -> None:
        """Logprobs of the prompt tokens that follow those of ``sequence``, from their hidden states [N, hidden]."""
        targets = list(sequence.next_prompt_token_ids)
        entries: list[TokenLogprobs] = []
        is_sound = True
        for first in range(0, len(targets), _PROMPT_LOGITS_ROWS):
            part = targets[first : first + _PROMPT_LOGITS_ROWS]
            logits = self.decoder.logits(hidden[first : first + len(part)])
            found = token_logprobs(logits, part, [sequence.num_prompt_logprobs or 0] * len(part))
            entries += [entry for entry in found if entry is not None]
            is_sound = is_sound and None not in found
        if is_sound:
            result.prompt_logprobs[sequence.sequence_id] = sequence.num_computed_tokens + 1, entries
        else:
            result.failed[sequence.sequence_id] = CANNOT_SAMPLE
