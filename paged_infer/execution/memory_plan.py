"""How large the block pool is, and how long a sequence and a step may get, from the device and the options."""

from __future__ import annotations

from dataclasses import dataclass

from paged_infer.cache.spec import kv_bytes_per_token
from paged_infer.config import EngineConfig
from paged_infer.execution.memory_profile import MemoryProfile, max_num_batched_tokens
from paged_infer.model.decoder import Decoder

CPU_POOL_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes of the paged cache and of a step. ``pool_bytes`` = num_blocks * block_size * kv_bytes_per_token.

    ``kv_bytes_per_token`` includes the cache of a draft model, which has the same blocks.
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_batched_tokens: int
    kv_bytes_per_token: int
    num_swap_blocks: int = 0
    kv_cache_dtype: str = "float32"  # as stored: a dtype, or the option's name for one of 8 bits
    profile: MemoryProfile | None = None  # if the pool takes what is left on a GPU

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.block_size * self.kv_bytes_per_token


def plan_memory(
    config: EngineConfig, decoder: Decoder, profile: MemoryProfile | None = None, draft: Decoder | None = None
) -> MemoryPlan:
    """Choose the sizes that the options leave open.

    Args:
        profile: what a GPU has left. None: on a CPU, or if ``num_blocks`` sets the size of the pool.
        draft: the draft model, with a cache of as many blocks.

    Raises:
        ValueError: ``max_model_len`` exceeds the positions of the model or of its draft model, or not even one
            block fits on the device.
    """
    limit = decoder.config.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ValueError(f"max_model_len={config.max_model_len} exceeds the model's max_position_embeddings={limit}")
    models, kind = [decoder] if draft is None else [decoder, draft], config.kv_cache_dtype
    per_token = kv_bytes_per_token([layer for model in models for layer in model.kv_spec(kind)])
    longest = config.max_model_len or limit
    num_blocks = config.num_blocks
    if num_blocks is None:
        bytes_per_block = per_token * config.block_size
        most = config.max_num_seqs * -(-longest // config.block_size)
        available = CPU_POOL_BYTES if profile is None else profile.available_kv_bytes
        num_blocks = min(most, available // bytes_per_block)
        if num_blocks < 1:
            raise ValueError(
                f"one block of {bytes_per_block} bytes does not fit in the {available} bytes left for the cache"
                + ("" if profile is None else f": {profile}")
            )
    max_model_len = config.max_model_len or min(limit, num_blocks * config.block_size)
    if draft is not None and draft.config.max_position_embeddings < max_model_len:
        raise ValueError(
            f"max_model_len={max_model_len} exceeds the draft model's "
            f"max_position_embeddings={draft.config.max_position_embeddings}"
        )
    return MemoryPlan(
        num_blocks,
        config.block_size,
        max_model_len,
        max_num_batched_tokens(config, decoder.device),
        per_token,
        _num_swap_blocks(config, num_blocks, per_token * config.block_size),
        str(decoder.dtype).removeprefix("torch.") if kind == "auto" else kind,
        profile,
    )


def _num_swap_blocks(config: EngineConfig, num_blocks: int, bytes_per_block: int) -> int:
    """The blocks that ``swap_space`` holds, at most the pool's number."""
    if config.preemption_mode != "swap":
        return 0
    fitting = int((1 if config.swap_space is None else config.swap_space) * 2**30) // bytes_per_block
    if not fitting:
        raise ValueError(
            f"swap_space={config.swap_space} GiB is less than a block of {bytes_per_block} bytes: "
            f"preemption_mode='swap' needs at least 1"
        )
    return min(num_blocks, fitting)
