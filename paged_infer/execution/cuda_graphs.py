"""CUDA graphs for decode steps: the whole step, from token ids to sampled tokens, as one launch.

A decode step of a small model is hundreds of kernels of a few microseconds each, and the host needs longer to launch
them than the device to run them. A graph records the launches with their arguments, and replays them all in one launch:

    pending_row, token_ids -> replace pending tokens by what the previous step sampled
                       -> decoder -> head -> logits [size, V] -> sampling kernel -> sampled [size]

All of it works on the tensors of ``input_buffers``. There is a graph for each of a list of batch sizes, and a step
uses the smallest that holds it. They are captured from the largest down and share one memory pool: intermediate
results are dead when a step ends, and steps run one after the other.

What is captured must hold for every step: one query per row, and no row longer than ``max_model_len``.
"""

from __future__ import annotations

import gc
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from paged_infer.cache.paged import PagedCache
from paged_infer.control.step import SamplingRow, ScheduledSequence, ScheduledStep
from paged_infer.execution.input_buffers import InputBuffers
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.attention_backends import AttentionBackend, triton_backend
from paged_infer.model.decoder import Decoder

logger = logging.getLogger(__name__)

Replay = Callable[[], object]
Capture = Callable[[Callable[[], None]], Replay]


def batch_sizes(largest: int) -> list[int]:
    """Batch sizes to capture, so that any number of rows up to ``largest`` fits into one that is not much larger.

    1, 2, 4, every 8th up to 256, every 16th up to 512, every 32nd up to 1024 and so on; and ``largest`` itself.

    >>> batch_sizes(20)
    [1, 2, 4, 8, 16, 20]
    """
    sizes, size = [1, 2, 4], 8
    while size < largest:
        sizes.append(size)
        size += max(8, (1 << size.bit_length()) >> 5)
    return [size for size in sizes if size < largest] + [largest]


def uses_graphs(
    enforce_eager: bool | None, device: torch.device, backend: AttentionBackend, decoder: nn.Module
) -> bool:
    """Whether decode steps of ``decoder`` are captured.

    Raises:
        ValueError: graphs are requested (``enforce_eager=False``) but cannot be used.
    """
    can_be_captured = device.type == "cuda" and backend is triton_backend
    if can_be_captured and any(getattr(module, "waits", False) for module in decoder.modules()):
        reason = "quantised experts have no kernel: in each step the host waits for the router's choice"
        if enforce_eager is False:
            raise ValueError(f"enforce_eager=False requests CUDA graphs, but {reason}")
        logger.warning("%s, and no CUDA graph is used", reason)
        return False
    if enforce_eager is False and not can_be_captured:
        raise ValueError(
            f"enforce_eager=False requests CUDA graphs, which need a GPU and attention_backend='triton'; the device is "
            f"{device}"
        )
    return can_be_captured and not enforce_eager


def decode_graphs(decoder: Decoder, cache: PagedCache, max_num_seqs: int, max_model_len: int) -> DecodeGraphs:
    """Capture the graphs of an engine on a GPU, and measure the memory that they take."""
    before = _free_bytes(decoder.device)
    with _no_collection():
        graphs = DecodeGraphs(
            decoder,
            cache,
            cache.ops.sample,
            max_rows=max_num_seqs,
            max_model_len=max_model_len,
            capture=CudaCapture(decoder.device),
        )
    graphs.num_bytes = before - _free_bytes(decoder.device)
    return graphs


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection: freeing an earlier engine's graphs during a capture is a driver error."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def release_unused(device: torch.device) -> None:
    """Return memory that is not in use to the driver, which then reports it as free.

    Tensors in a reference cycle, such as those of an earlier engine's graphs, are in use until they are collected,
    which could otherwise happen between two readings.
    """
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


def _free_bytes(device: torch.device) -> int:
    release_unused(device)
    return torch.cuda.mem_get_info(device)[0]


class CudaCapture:
    """Runs a function once, which compiles its kernels and allocates the libraries' workspaces, then captures it.

    All captures of one object share a memory pool. Both runs use a separate stream: the default one cannot be
    captured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, fn: Callable[[], None]) -> Replay:
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                fn()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                fn()
        return graph.replay


class DecodeGraphs:
    """Decode steps of up to ``max_rows`` sequences, captured when this is made.

    Args:
        sample: ``kernels.sample``, or None: then the caller samples from the logits.
        max_rows: the most sequences in a step.
        max_model_len: the longest sequence.
        capture: ``CudaCapture``, or a function like it; the step that it captures uses the same tensors each time.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: PagedCache,
        sample: Callable[..., tuple[Tensor, Tensor]] | None,
        *,
        max_rows: int,
        max_model_len: int,
        capture: Capture,
    ) -> None:
        self.decoder, self.cache = decoder, cache
        self.has_sampler = sample is not None
        self._sample = sample
        self._max_model_len = max_model_len
        self.num_bytes = 0  # that the graphs take, if measured
        self.sizes = batch_sizes(max_rows)
        self.buffers = InputBuffers(
            max_rows, -(-max_model_len // cache.block_size), decoder.config.vocab_size, decoder.dtype, decoder.device
        )
        self._last: Tensor | None = None  # what ``run`` returned last: already in the buffers
        with torch.inference_mode():
            largest_first = {size: capture(self._step_of(size)) for size in reversed(self.sizes)}
        self._replays = [largest_first[size] for size in self.sizes]

    def fits(self, step: ScheduledStep) -> bool:
        """Whether ``step`` has only decodes, each of which samples one token."""
        return len(step.sequences) <= self.buffers.max_rows and all(
            len(s.token_ids) == 1
            and isinstance(s.sample, SamplingRow)
            and not s.forks
            and s.num_prompt_logprobs is None
            for s in step.sequences
        )

    def run(
        self, sequences: Sequence[ScheduledSequence], last: Tensor | None, last_rows: Mapping[int, int]
    ) -> tuple[Tensor, Tensor]:
        """One step, queued on the device.

        Args:
            sequences: R sequences of a step that ``fits``.
            last: tokens that the previous step sampled, on the device, at most ``max_rows``; None: none are pending.
            last_rows: by sequence id, the index of its token in ``last``.

        Returns:
            logits [R, V], and tokens int64 [R] if there is a sampling kernel: sampled by temperature and seed
            alone, -1 if a row cannot be sampled. Both are overwritten by the next run.
        """
        if last is not None and last is not self._last:
            self.buffers.sampled[: len(last)].copy_(last)
        which = bisect_left(self.sizes, len(sequences))
        self.buffers.fill(sequences, self.sizes[which], self.cache.block_size, last_rows)
        self.replay(which)
        self._last = self.buffers.sampled[: len(sequences)]
        return self.buffers.logits[: len(sequences)], self._last

    def replay(self, which: int) -> None:
        """Queue the graph of ``sizes[which]``."""
        self._replays[which]()

    def _step_of(self, size: int) -> Callable[[], None]:
        """The step to capture for ``size`` rows. It neither waits for the device nor copies from the host."""
        buffers = self.buffers
        columns = {name: column[:size] for name, column in buffers.columns.items()}
        block_tables, query_start_loc = buffers.block_tables[:size], buffers.query_start_loc[: size + 1]
        sampled, logits = buffers.sampled[:size], buffers.logits[:size]

        def step() -> None:
            pending_row = columns["pending_row"]
            # A failed row left -1. Its request ends, so any valid token will do here.
            pending = buffers.sampled.index_select(0, pending_row.clamp_min(0)).clamp_min(0)
            token_ids = torch.where(pending_row >= 0, pending, columns["token_ids"])
            meta = AttentionMetadata(
                positions=columns["positions"],
                slot_mapping=columns["slot_mapping"],
                query_start_loc=query_start_loc,
                seq_lens=columns["seq_lens"],
                block_tables=block_tables,
                num_decodes=size,
                max_query_len=1,
                max_seq_len=self._max_model_len,
            )
            self.decoder.logits(self.decoder(token_ids, self.cache, meta), out=logits)
            if self._sample is not None:
                names = ("temperatures", "seeds", "sample_indices", "sample_positions")
                tokens, _ = self._sample(logits, *(columns[name] for name in names))
                sampled.copy_(tokens)

        return step
