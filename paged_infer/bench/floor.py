"""The least time that a workload can take on a machine, from the bytes and operations that it needs.

    prefill   2 * parameters * prompt tokens + attention                          operations, at the matmul rate
    decode    steps * weights + kv_bytes_per_token * (sum of all contexts)         bytes, at the memory's bandwidth

Decoding takes as many steps as the longest output, or more if fewer sequences run at once than there are. Batching
shares the weights among them; contexts are not shared. The roofline's rates are measured (``roofline``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from paged_infer.bench.roofline import Roofline
from paged_infer.model.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds. Prompts are bound by computing and decoding by memory, unless a small model or batch reverses that."""

    prefill_s: float
    decode_s: float
    memory_s: float  # all that decoding reads, over the bandwidth; over a run's seconds: MBU
    compute_s: float  # all operations, over the matmul rate; over a run's seconds: MFU

    @property
    def seconds(self) -> float:
        return self.prefill_s + self.decode_s


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What attention costs in one layer, for each token that a query attends to."""

    kv_bytes: int
    flops: int  # 2 for q k^T and 2 for the weighted sum of v, in each of a query head's dimensions
    window: int | None

    def attended(self, num_before: int, num_queries: int) -> int:
        """Sum of the contexts of queries that follow each other, the first with ``num_before`` tokens before it."""
        first, last = num_before + 1, num_before + num_queries
        if self.window is None or last <= self.window:
            return (first + last) * num_queries // 2
        return sum(min(context, self.window) for context in range(first, last + 1))


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a decoder reads and computes."""

    weight_bytes: int  # read by a decode step; an embedding that is not the head is only looked up
    flops_per_token: int  # 2 for each weight of the layers
    head_flops: int  # 2 for each weight of the head, which only sampled tokens need
    layers: tuple[LayerCost, ...]

    @classmethod
    def of(cls, decoder: Decoder, kv_cache_dtype: str = "auto") -> ModelCost:
        config = decoder.config
        embedding = config.vocab_size * config.hidden_size
        looked_up = config.learned_positions * config.max_position_embeddings * config.hidden_size
        looked_up += 0 if config.tie_word_embeddings else embedding
        if config.moe is not None:  # a batch reads more experts than one token: see ``expected_experts``
            looked_up += config.moe.idle_parameters(config.hidden_size)
        read = config.num_parameters - looked_up
        return cls(
            weight_bytes=read * decoder.dtype.itemsize,
            flops_per_token=2 * (read - embedding),
            head_flops=2 * embedding,
            layers=tuple(
                LayerCost(layer.bytes_per_token, 2 * config.num_heads * (layer.k_dim + layer.v_dim), layer.window)
                for layer in decoder.kv_spec(kv_cache_dtype)
            ),
        )

    def floor(
        self, prompt_lens: Sequence[int], output_lens: Sequence[int], roofline: Roofline, num_running: int | None = None
    ) -> Floor:
        """Of requests of these lengths, at most ``num_running`` at once (None: all).

        The first token of an output comes with its prompt; each further one reads all that lie before it.
        """
        pairs = list(zip(prompt_lens, output_lens, strict=True))
        num_decoded = sum(output_lens) - len(pairs)
        num_steps = max(max(output_lens) - 1, -(-num_decoded // (num_running or len(pairs))))
        num_bytes = num_steps * self.weight_bytes
        prefill = self.flops_per_token * sum(prompt_lens) + self.head_flops * len(pairs)
        decode = (self.flops_per_token + self.head_flops) * num_decoded
        for layer, num_alike in Counter(self.layers).items():
            attended = num_alike * sum(layer.attended(prompt, output - 1) for prompt, output in pairs)
            num_bytes += layer.kv_bytes * attended
            decode += layer.flops * attended
            prefill += num_alike * layer.flops * sum(layer.attended(0, prompt) for prompt in prompt_lens)
        memory_s = num_bytes / roofline.bandwidth_bytes_per_s
        compute_s = decode / roofline.matmul_flops_per_s
        prefill_s = roofline.prefill_floor_s(prefill)
        return Floor(
            prefill_s=max(prefill_s, self.weight_bytes / roofline.bandwidth_bytes_per_s),
            decode_s=max(memory_s, compute_s),
            memory_s=memory_s,
            compute_s=prefill_s + compute_s,
        )
