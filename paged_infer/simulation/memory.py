"""How many blocks a card's pool has: what the rule of ``execution.memory_plan`` leaves of ``gpu_memory_utilization``.

    gpu_memory_utilization x total    [ weights | activations | logits, sampling | graphs |      block pool      ]

The engine measures what the largest step, the costliest sampling and the graphs take. Here these are computed from the
shape, so they are estimates: for Llama-3.1-8B on an RTX 4090 the pool comes out within a few percent of vLLM's.
"""

from __future__ import annotations

from dataclasses import dataclass

from paged_infer.simulation.costs import Roofline

SAMPLING_BYTES = 24  # per logit while all are sorted: 16 bits, float32, sorted values, their indices, their sums
GRAPH_BYTES = 32 * 2**20 + 36 * 8 * 2**20  # allowances of execution.memory_profile, for 256 sequences
LARGE_GPU_BYTES = 70 * 2**30


@dataclass(frozen=True, slots=True)
class PoolEstimate:
    """Bytes on each card, and the blocks that are left."""

    budget: float
    weights: float
    activations: float
    logits: float
    graphs: float
    bytes_per_block: float

    @property
    def num_blocks(self) -> int:
        left = self.budget - self.weights - self.activations - self.logits - self.graphs
        return max(0, int(left // self.bytes_per_block))


def default_num_batched_tokens(memory_bytes: float) -> int:
    """The engine's default: 8192 on a GPU of at least 70 GiB, 2048 elsewhere."""
    return 8192 if memory_bytes >= LARGE_GPU_BYTES else 2048


def estimate_pool(
    cost: Roofline,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    gpu_memory_utilization: float = 0.9,
    block_size: int = 16,
) -> PoolEstimate:
    """The pool of a card that serves this model with these limits.

    Raises:
        ValueError: not even one block fits; the message lists what takes the memory.
    """
    if not 0 < gpu_memory_utilization <= 1:
        raise ValueError(f"gpu_memory_utilization={gpu_memory_utilization}: must be > 0 and <= 1")
    shape, cards, width = cost.shape, cost.tensor_parallel, cost.dtype_bytes
    config = shape.config
    idle = 0 if config.moe is None else config.moe.idle_parameters(config.hidden_size)
    weights = (shape.layer_weights + idle) * cost.weight_bytes + (shape.head_weights + shape.embedding_weights) * width
    # An MLP's two inputs and their product; the residual, its sum and the norm of that.
    activations = max_num_batched_tokens * (3 * config.intermediate_size / cards + 3 * config.hidden_size) * width
    pool = PoolEstimate(
        budget=gpu_memory_utilization * cost.card.memory_bytes,
        weights=weights / cards,
        activations=activations,
        logits=max_num_seqs * config.vocab_size * SAMPLING_BYTES,
        graphs=GRAPH_BYTES,
        bytes_per_block=block_size * cost.kv_bytes_per_token,
    )
    if pool.num_blocks < 1:
        raise ValueError(
            f"{shape.name} on {cards} {cost.card.name}: {pool.weights / 1e9:.1f} GB of weights on each leave no block "
            f"of the {pool.budget / 1e9:.1f} GB that gpu_memory_utilization={gpu_memory_utilization:g} allows"
        )
    return pool
