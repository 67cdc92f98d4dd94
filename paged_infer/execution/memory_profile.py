"""What a GPU's memory is used for besides the block pool, measured by running what needs the most of it.

    gpu_memory_utilization x total    [ weights | activations | logits, sampling | graphs |      block pool      ]
                                        loaded    the largest step   the costliest    the      what is left
                                                                     sampling         largest

Everything is run once on a cache of one block, before the pool takes the rest (vLLM sizes its pool in this way too).
Graphs are captured after the pool has been made, as they hold its address; what they will take is what their largest
step takes when it is launched kernel by kernel, and allowances for cuBLAS and for what the driver keeps of each graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from paged_infer.cache.paged import PagedCache
from paged_infer.config import EngineConfig
from paged_infer.control.step import SamplingRow
from paged_infer.execution.cuda_graphs import DecodeGraphs, batch_sizes, release_unused
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.attention_backends import AttentionBackend
from paged_infer.kernels.op_sets import Ops
from paged_infer.model.decoder import Decoder
from paged_infer.params import SamplingParams
from paged_infer.sampling.sampler import Sampler

# Allowances, not measurements; what was taken is known after the capture.
DRIVER_BYTES_PER_GRAPH = 8 * 2**20
# torch keeps a workspace of cuBLAS for each stream that multiplies: 32 MiB on Hopper and Blackwell, about 8 on others.
# The captures' stream is not the one that the profile runs on, so the profile does not see its workspace.
CAPTURE_WORKSPACE_BYTES = 32 * 2**20


def max_num_batched_tokens(config: EngineConfig, device: torch.device) -> int:
    """The most tokens in a step: the option, or its default for the device."""
    return config.max_num_batched_tokens or _default_num_batched_tokens(device)


def _default_num_batched_tokens(device: torch.device) -> int:
    """8192 on a GPU of at least 70 GiB, 2048 elsewhere: vLLM's defaults for its server, except 2048 for the A100 there.

    A large GPU computes 2048 tokens of a small model in the time that the host needs to launch them. The activations of
    8192 take four times as much memory, about 1 GiB in an 8B model: too much of a small card's pool.
    """
    if device.type != "cuda":
        return 2048
    return 8192 if torch.cuda.get_device_properties(device).total_memory >= 70 * 2**30 else 2048


class Meter(Protocol):
    """Reads the use of a device's memory."""

    def free_and_total(self) -> tuple[int, int]:
        """Free and total bytes."""
        ...

    def allocated(self) -> int:
        """Bytes in tensors now."""
        ...

    def peak_of(self, run: Callable[[], object]) -> int:
        """Peak bytes in tensors during ``run``, beyond those before."""
        ...


class CudaMeter:
    """Reads a GPU's memory, through torch's allocator and the driver."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free_and_total(self) -> tuple[int, int]:
        release_unused(self._device)
        return torch.cuda.mem_get_info(self._device)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak_of(self, run: Callable[[], object]) -> int:
        release_unused(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = self.allocated()
        run()
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device) - before
        release_unused(self._device)
        return peak


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """Bytes of a device, and how they are used. ``free`` is from before the weights were loaded."""

    total: int
    free: int
    gpu_memory_utilization: float
    weights: int
    activations: int
    logits: int
    graphs: int

    @property
    def budget(self) -> int:
        """Bytes that this engine may use: its share of the total, but no more than was free."""
        return min(int(self.total * self.gpu_memory_utilization), self.free)

    @property
    def available_kv_bytes(self) -> int:
        """Bytes that are left for the pool."""
        return max(0, self.budget - self.weights - self.activations - self.logits - self.graphs)


@dataclass(frozen=True, slots=True)
class MemoryProfiler:
    """Measures a model's memory. Started before its weights are loaded, to leave out what was allocated before."""

    meter: Meter
    free: int
    total: int
    allocated: int

    @classmethod
    def start(cls, meter: Meter) -> MemoryProfiler:
        free, total = meter.free_and_total()
        return cls(meter, free, total, meter.allocated())

    def finish(
        self, config: EngineConfig, decoder: Decoder, backend: AttentionBackend, ops: Ops, *, has_graphs: bool
    ) -> MemoryProfile:
        """Run what needs the most memory, and record how much it took."""
        weights = self.meter.allocated() - self.allocated
        cache = PagedCache(decoder.kv_spec(config.kv_cache_dtype), 1, config.block_size, backend, decoder.device, ops)
        longest = config.max_model_len or decoder.config.max_position_embeddings
        graphs = 0
        with torch.inference_mode():
            activations = self.meter.peak_of(lambda: run_largest_step(config, decoder, cache, longest))
            logits = self.meter.peak_of(lambda: run_costliest_sampling(config, decoder, ops))
        if has_graphs:
            graphs = CAPTURE_WORKSPACE_BYTES + DRIVER_BYTES_PER_GRAPH * len(batch_sizes(config.max_num_seqs))
            graphs += self.meter.peak_of(lambda: run_largest_decode(config, decoder, cache, longest))
        return MemoryProfile(
            total=self.total,
            free=self.free,
            gpu_memory_utilization=config.gpu_memory_utilization,
            weights=weights,
            activations=activations,
            logits=logits,
            graphs=graphs,
        )


def run_largest_step(config: EngineConfig, decoder: Decoder, cache: PagedCache, longest: int) -> Tensor:
    """``max_num_batched_tokens`` tokens in as few prompts as possible: hidden [T, hidden]. Nothing is stored."""
    device = decoder.device
    num_tokens = max_num_batched_tokens(config, device)
    full, rest = divmod(num_tokens, longest)
    lengths = [rest] * (rest > 0) + [longest] * full  # a prompt of one token comes first, as AttentionMetadata requires
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.arange(num_tokens) - torch.repeat_interleave(bounds[:-1], torch.tensor(lengths))
    max_blocks = -(-max(lengths) // cache.block_size)
    step = AttentionMetadata(
        positions=positions.to(device),
        slot_mapping=torch.full((num_tokens,), -1, device=device),
        query_start_loc=bounds.to(device, torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_tables=torch.zeros(len(lengths), max_blocks, dtype=torch.int32, device=device),
        num_decodes=lengths.count(1),
        max_query_len=max(lengths),
        max_seq_len=max(lengths),
    )
    return decoder(torch.zeros(num_tokens, dtype=torch.int64, device=device), cache, step)


def run_costliest_sampling(config: EngineConfig, decoder: Decoder, ops: Ops) -> Tensor:
    """``max_num_seqs`` rows with a penalty and a nucleus in a flat distribution, sorted in full: tokens [R]."""
    hidden = torch.zeros(config.max_num_seqs, decoder.config.hidden_size, dtype=decoder.dtype, device=decoder.device)
    params = SamplingParams(temperature=1.0, top_p=0.9, presence_penalty=1.0)
    rows = [SamplingRow(params, seed, 0, 1, 1, output_token_ids=[0]) for seed in range(config.max_num_seqs)]
    return Sampler(ops.sample, ops.argmax).sample(decoder.logits(hidden), rows).tokens


def run_largest_decode(config: EngineConfig, decoder: Decoder, cache: PagedCache, longest: int) -> None:
    """Launch the decode step that will be captured later."""

    def launched(step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    DecodeGraphs(
        decoder, cache, cache.ops.sample, max_rows=config.max_num_seqs, max_model_len=longest, capture=launched
    )
