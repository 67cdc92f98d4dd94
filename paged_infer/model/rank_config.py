"""The sizes of one rank's layers: a ``ModelConfig`` with its own heads and widths, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from paged_infer.model.config import ModelConfig


def config_of_rank(config: ModelConfig, size: int) -> ModelConfig:
    """The part of the model's layers that each of ``size`` ranks computes: equal for all. The vocabulary stays whole.

    If there are fewer key heads than ranks, several ranks compute and cache the same one.

    Raises:
        ValueError: the ranks do not divide the heads or a width; the message names it, and numbers of ranks that do.
    """
    if size == 1:
        return config
    if size < 1 or (reason := next(_reasons(config, size), None)) is not None:
        fitting = [n for n in range(1, config.num_heads + 1) if next(_reasons(config, n), None) is None]
        numbers = ", ".join(map(str, fitting))
        raise ValueError(
            f"tensor_parallel_size={size}: must be at least 1"
            if size < 1
            else f"tensor_parallel_size={size}: {reason}; these numbers of ranks would do: {numbers}"
        )
    moe = config.moe
    if moe is not None:
        shared = moe.shared_intermediate_size // size
        moe = replace(moe, intermediate_size=moe.intermediate_size // size, shared_intermediate_size=shared)
    heads = config.num_heads // size
    return replace(
        config,
        num_heads=heads,
        num_kv_heads=heads if config.mla is not None else max(1, config.num_kv_heads // size),
        intermediate_size=config.intermediate_size // size,
        moe=moe,
    )


def _reasons(config: ModelConfig, size: int) -> Iterator[str]:
    """Why the model cannot be divided among ``size`` ranks."""
    moe, kv_heads = config.moe, config.num_kv_heads
    has_mlp = moe is None or not all(moe.layers)
    widths = {
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size if has_mlp else 0,
        "the experts' intermediate size": 0 if moe is None else moe.intermediate_size,
        "the shared expert's intermediate size": 0 if moe is None else moe.shared_intermediate_size,
    }
    for name, width in widths.items():
        if width % size:
            yield f"does not divide {name}={width}"
    if config.mla is None and kv_heads % size and size % kv_heads:
        yield f"neither divides num_key_value_heads={kv_heads} nor is a multiple of it"
    if -(-config.vocab_size // size) * (size - 1) >= config.vocab_size:
        yield f"too many for vocab_size={config.vocab_size}"
