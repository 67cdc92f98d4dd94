"""The models of one rank, and, once the size of the pool is known, their caches and runners.

folder -> decoder, draft -> how much memory is left -> (the smallest pool of all ranks) -> cache -> runner -> executor
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from paged_infer.cache.paged import PagedCache
from paged_infer.config import EngineConfig
from paged_infer.execution.cuda_graphs import decode_graphs, uses_graphs
from paged_infer.execution.draft_model import DraftModel, load_draft
from paged_infer.execution.executor import InProcessExecutor
from paged_infer.execution.memory_plan import plan_memory
from paged_infer.execution.memory_profile import CudaMeter, MemoryProfiler
from paged_infer.execution.model_runner import ModelRunner
from paged_infer.kernels.attention.mla import LATENT_SCALES
from paged_infer.kernels.attention_backends import attention_backend, check_options, latent_backend, suited_backend
from paged_infer.kernels.device import device_of
from paged_infer.model.attention import score_options
from paged_infer.model.decoder import Decoder
from paged_infer.model.loading.load import load_decoder, saved_dtype
from paged_infer.model.parallel import ALONE, Collective
from paged_infer.sampling.sampler import Sampler


class LoadedModels:
    """One rank's part of the decoder of ``folder``, and the whole draft model if there is one, on their device.

    A draft model is too small to gain from sharding: each rank computes all of it, and so drafts the same tokens.

    Attributes:
        memory: how large the pool can be on this rank. ``executor`` makes it.

    Raises:
        ValueError: a checkpoint or an option that cannot be used; the message names the value and the limit.
    """

    def __init__(self, folder: Path, config: EngineConfig, parallel: Collective = ALONE) -> None:
        device = device_of(config.device)
        backend, ops = attention_backend(config.attention_backend, device)
        dtype = dtype_of(config.dtype, folder, device)
        seed = config.seed if config.load_format == "dummy" else None
        is_measured = device.type == "cuda" and config.num_blocks is None
        profiler = MemoryProfiler.start(CudaMeter(device)) if is_measured else None
        decoder = load_decoder(
            folder,
            dtype,
            device,
            ops,
            dummy_seed=seed,
            max_model_len=config.max_model_len,
            quantization=config.quantization,
            parallel=parallel,
        )
        if config.trace:
            decoder.count_expert_load()
        draft = load_draft(config, decoder, ops)  # before the profile, which includes its weights
        for model in (decoder, draft):
            if model is not None:
                check_options(backend, score_options(model.config))
                if config.kv_cache_dtype != "auto":
                    needed_by = f"kv_cache_dtype={config.kv_cache_dtype!r}"
                    if model.config.mla is None:
                        check_options(backend, ("k_scale", "v_scale"), needed_by)
                    else:
                        check_options(latent_backend(backend).decode, LATENT_SCALES, needed_by)
                backend = suited_backend(backend, model.config.head_dim)
        self._has_graphs = uses_graphs(config.enforce_eager, device, backend, decoder)
        self._profile = None
        if profiler is not None:
            self._profile = profiler.finish(config, decoder, backend, ops, has_graphs=self._has_graphs)
        self.config, self.device, self.decoder = config, device, decoder
        self._draft, self._backend, self._ops = draft, backend, ops
        self.memory = plan_memory(config, decoder, self._profile, draft)

    def executor(self, num_blocks: int | None = None) -> InProcessExecutor:
        """Reserve the pool.

        Args:
            num_blocks: the pool's blocks, if another rank has room for fewer than ``memory.num_blocks``.
        """
        config, ops = self.config, self._ops
        if num_blocks is not None and num_blocks != self.memory.num_blocks:
            config = dataclasses.replace(config, num_blocks=num_blocks)
            self.memory = plan_memory(config, self.decoder, self._profile, self._draft)
        cache, graphs = self._cache_of(self.decoder), None
        if self._has_graphs:
            graphs = decode_graphs(self.decoder, cache, config.max_num_seqs, self.memory.max_model_len)
        drafter = None
        if self._draft is not None:
            drafter = DraftModel(
                self._draft, self._cache_of(self._draft), Sampler(ops.sample, ops.argmax, ops.mask_logits)
            )
        self.decoder.parallel.traffic.reset()  # what a measured step and the capture of graphs handed over
        return InProcessExecutor(
            ModelRunner(self.decoder, cache, Sampler(ops.sample, ops.argmax, ops.mask_logits), graphs), drafter
        )

    def _cache_of(self, decoder: Decoder) -> PagedCache:
        spec, memory = decoder.kv_spec(self.config.kv_cache_dtype), self.memory
        return PagedCache(
            spec,
            memory.num_blocks,
            memory.block_size,
            self._backend,
            self.device,
            self._ops,
            num_swap_blocks=memory.num_swap_blocks,
        )


def dtype_of(name: str, folder: Path, device: torch.device) -> torch.dtype:
    """The dtype named ``name``; "auto" is float32 on a CPU and the checkpoint's own dtype elsewhere."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else saved_dtype(folder)
    return getattr(torch, name)
