"""Build the parts of an engine, each from those before it.

folder -> tokenizer, models -> how much memory is left -> pool -> executor       (``execution.loaded_models``)
                                                       -> BlockManager -> Scheduler
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from paged_infer.config import EngineConfig
from paged_infer.control.admission import check_budget
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.policies import make_policy
from paged_infer.control.scheduler import Scheduler
from paged_infer.control.speculation import make_proposer
from paged_infer.control.trace import Trace
from paged_infer.execution.executor import Executor, InProcessExecutor
from paged_infer.execution.external_launcher import LaunchedExecutor, load_launched
from paged_infer.execution.loaded_models import LoadedModels
from paged_infer.execution.memory_plan import MemoryPlan
from paged_infer.execution.multiprocess import MultiprocessExecutor
from paged_infer.execution.ray_cluster import RayExecutor
from paged_infer.model.config import ModelConfig
from paged_infer.model.loading.checkpoint import read_config
from paged_infer.model.rank_config import config_of_rank
from paged_infer.text.tokenizer import Tokenizer


class EngineParts(NamedTuple):
    """The parts of an ``LLMEngine``. ``tokenizer`` is None if the checkpoint has none."""

    tokenizer: Tokenizer | None
    model: ModelConfig
    memory: MemoryPlan
    executor: Executor
    scheduler: Scheduler


def build_parts(folder: Path, config: EngineConfig) -> EngineParts:
    """Load ``folder`` and reserve the block pool.

    Raises:
        ValueError: a checkpoint or an option that cannot be used; the message names the value and the limit.
        EngineDeadError: a rank ended while it loaded.
    """
    tokenizer = Tokenizer.from_pretrained(folder)  # before the weights take memory, since it may fail
    policy = make_policy(config.scheduling_policy, config.scheduler_delay_factor)
    executor, memory = _load(
        folder, config, lambda plan: check_budget(policy, plan.max_num_batched_tokens, plan.max_model_len)
    )
    if isinstance(executor, InProcessExecutor):
        model = executor.runner.decoder.config
    else:
        model = replace(read_config(folder), max_model_len=config.max_model_len)
    scheduler = Scheduler(
        BlockManager(memory.num_blocks, memory.block_size, num_swap_blocks=memory.num_swap_blocks),
        config.max_num_seqs,
        memory.max_num_batched_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        preemption_mode=config.preemption_mode,
        policy=policy,
        proposer=make_proposer(config.speculation),
        trace=Trace(memory.num_blocks, memory.kv_cache_dtype) if config.trace else None,
    )
    return EngineParts(tokenizer, model, memory, executor, scheduler)


def _load(folder: Path, config: EngineConfig, check: Callable[[MemoryPlan], None]) -> tuple[Executor, MemoryPlan]:
    """Load the models where the options put them, and a pool for them. ``check`` is called before the pool is made."""
    if config.executor_backend in ("mp", "ray"):
        config_of_rank(read_config(folder), config.tensor_parallel_size)  # refused before a process is started
        executor_type = MultiprocessExecutor if config.executor_backend == "mp" else RayExecutor
        ranks = executor_type(folder, config)
        try:
            check(ranks.memory)
            ranks.reserve()
        except BaseException:
            ranks.close()
            raise
        return ranks, ranks.memory
    if config.executor_backend == "external_launcher":
        rank, models, num_blocks = load_launched(folder, config)
        check(models.memory)
        return LaunchedExecutor(rank, models.executor(num_blocks)), models.memory
    models = LoadedModels(folder, config)
    check(models.memory)
    return models.executor(), models.memory
