"""Build the parts of an engine, each from those before it.

folder -> decoder, tokenizer -> how much memory is left -> cache -> runner -> executor
                                                        -> BlockManager -> Scheduler
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from paged_infer.cache.paged import PagedCache
from paged_infer.config import EngineConfig
from paged_infer.control.admission import check_budget
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.policies import make_policy
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.speculation import make_proposer
from paged_infer.control.trace import Trace
from paged_infer.execution.cuda_graphs import decode_graphs, uses_graphs
from paged_infer.execution.draft_model import DraftModel, load_draft
from paged_infer.execution.executor import InProcessExecutor
from paged_infer.execution.memory_plan import MemoryPlan, plan_memory
from paged_infer.execution.memory_profile import CudaMeter, MemoryProfiler
from paged_infer.execution.model_runner import ModelRunner
from paged_infer.kernels.attention_backends import attention_backend, check_options, suited_backend
from paged_infer.kernels.device import device_of
from paged_infer.model.attention import score_options
from paged_infer.model.decoder import Decoder
from paged_infer.model.loading.load import load_decoder, saved_dtype
from paged_infer.sampling.sampler import Sampler
from paged_infer.text.tokenizer import Tokenizer


class EngineParts(NamedTuple):
    """The parts of an ``LLMEngine``. ``tokenizer`` is None if the checkpoint has none."""

    tokenizer: Tokenizer | None
    memory: MemoryPlan
    executor: InProcessExecutor
    scheduler: Scheduler


def build_parts(folder: Path, config: EngineConfig) -> EngineParts:
    """Load ``folder`` and reserve the block pool.

    Raises:
        ValueError: a checkpoint or an option that cannot be used; the message names the value and the limit.
    """
    device = device_of(config.device)
    backend, ops = attention_backend(config.attention_backend, device)
    dtype = dtype_of(config.dtype, folder, device)
    seed = config.seed if config.load_format == "dummy" else None
    is_measured = device.type == "cuda" and config.num_blocks is None
    profiler = MemoryProfiler.start(CudaMeter(device)) if is_measured else None
    tokenizer = Tokenizer.from_pretrained(folder)  # before the weights take memory: it may be refused
    few_bits = config.quantization
    limit = config.max_model_len
    decoder = load_decoder(folder, dtype, device, ops, dummy_seed=seed, max_model_len=limit, quantization=few_bits)
    if config.trace:
        decoder.count_expert_load()
    draft = load_draft(config, decoder, ops)  # before the profile, which includes its weights
    for model in (decoder, draft):
        if model is not None:
            check_options(backend, score_options(model.config))
            if config.kv_cache_dtype != "auto":
                check_options(backend, ("k_scale", "v_scale"), f"kv_cache_dtype={config.kv_cache_dtype!r}")
            backend = suited_backend(backend, model.config.head_dim)
    has_graphs = uses_graphs(config.enforce_eager, device, backend, decoder)
    profile = None
    if profiler is not None:
        profile = profiler.finish(config, decoder, backend, ops, has_graphs=has_graphs)
    memory = plan_memory(config, decoder, profile, draft)
    policy = make_policy(config.scheduling_policy, config.scheduler_delay_factor)
    check_budget(policy, memory.max_num_batched_tokens, memory.max_model_len)
    size, num_swap_blocks = (memory.num_blocks, memory.block_size), memory.num_swap_blocks

    def cache_of(decoder: Decoder) -> PagedCache:
        spec = decoder.kv_spec(config.kv_cache_dtype)
        return PagedCache(spec, *size, backend, device, ops, num_swap_blocks=num_swap_blocks)

    cache, sampler = cache_of(decoder), Sampler(ops.sample, ops.argmax)
    graphs = None
    if has_graphs:
        graphs = decode_graphs(decoder, cache, config.max_num_seqs, memory.max_model_len)
    drafter = None if draft is None else DraftModel(draft, cache_of(draft), Sampler(ops.sample, ops.argmax))
    scheduler = Scheduler(
        BlockManager(*size, num_swap_blocks=num_swap_blocks),
        config.max_num_seqs,
        memory.max_num_batched_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        preemption_mode=config.preemption_mode,
        policy=policy,
        proposer=make_proposer(config.speculation),
        trace=Trace(memory.num_blocks, memory.kv_cache_dtype) if config.trace else None,
    )
    executor = InProcessExecutor(ModelRunner(decoder, cache, sampler, graphs), drafter)
    return EngineParts(tokenizer, memory, executor, scheduler)


def dtype_of(name: str, folder: Path, device: torch.device) -> torch.dtype:
    """The dtype named ``name``; "auto" is float32 on a CPU and the checkpoint's own dtype elsewhere."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else saved_dtype(folder)
    return getattr(torch, name)
