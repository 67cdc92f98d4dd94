"""The decoder: token ids in, logits out. One model for every family and every baseline.

It is independent of requests, batches and memory: T tokens arrive packed, and ``cache.attend`` is the only place where
a token reads earlier tokens. Any cache works.

    token_ids [T] -> embedding -> layer 0 .. L-1 -> norm -> hidden [T, hidden] -> logits [R, vocab] of chosen rows
                                    |
                                    +-- x + attention(norm(x)):  q, k, v -> cache.attend(layer, q, k, v, step)
                                    +-- x + mlp(norm(x))

Residual additions are part of the norms: an addition and the norm after it are one pass over memory
(``kernels.op_sets``).

Of N ranks, each computes attention and MLP of its own heads and columns, which give a part of the sublayer's output;
the ranks meet in a sum after each (``parallel``). Norms and the residual stream are the same on all.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from paged_infer.cache.spec import Cache, LayerSpec
from paged_infer.kernels.attention.metadata import AttentionMetadata
from paged_infer.kernels.cpu.linear import PanelProduct
from paged_infer.kernels.kv_quant import KV_DTYPES
from paged_infer.kernels.op_sets import TORCH_OPS, Ops
from paged_infer.model.attention import Attention, Rope
from paged_infer.model.config import ModelConfig
from paged_infer.model.layers import MLP, AddOnly, Embedding, distinct_ropes, make_norm, make_rotary
from paged_infer.model.layers_in_c import WholeLayers, whole_layers
from paged_infer.model.linear import Linear, MethodOf, PackedMethod
from paged_infer.model.mla import LatentAttention
from paged_infer.model.moe import Experts, MoE
from paged_infer.model.parallel import ALONE, Collective
from paged_infer.model.rank_config import config_of_rank
from paged_infer.model.vocabulary import make_embedding, make_head


class DecoderLayer(nn.Module):
    rope_index: int | None  # which of the decoder's ``rotary``; None: no RoPE

    def __init__(self, config: ModelConfig, layer: int, ops: Ops, parallel: Collective) -> None:
        super().__init__()
        self.parallel = parallel
        self.attention_norm = make_norm(config, ops) if config.pre_norm else AddOnly()
        is_latent = config.mla is not None
        self.attention = LatentAttention(config, layer, ops) if is_latent else Attention(config, layer, ops, parallel)
        self.mlp_norm = make_norm(config, ops) if config.pre_norm else AddOnly()
        has_experts = config.moe is not None and config.moe.layers[layer]
        self.mlp = MoE(config, layer, ops) if has_experts else MLP(config, ops)
        self.attention_output_norm = make_norm(config, ops) if config.post_norm else None
        self.mlp_output_norm = make_norm(config, ops) if config.post_norm else None
        self.residual_multiplier = config.residual_multiplier

    def forward(
        self, x: Tensor, residual: Tensor | None, rope: Rope | None, cache: Cache, step: AttentionMetadata
    ) -> tuple[Tensor, Tensor]:
        """The last sublayer's output and the residual stream, both [T, hidden] -> the same two after this layer."""
        x, residual = self.attention_norm(x, residual)
        x = self.parallel.all_reduce(self.attention(x, rope, cache, step))
        x = self._finish(x, self.attention_output_norm)
        x, residual = self.mlp_norm(x, residual)
        x = self.mlp(x, step.slot_mapping) if isinstance(self.mlp, MoE) else self.mlp(x)
        return self._finish(self.parallel.all_reduce(x), self.mlp_output_norm), residual

    def _finish(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """A sublayer's output [T, hidden], before it joins the residual stream."""
        x = x if norm is None else norm(x, None)[0]
        return x if self.residual_multiplier == 1 else x * self.residual_multiplier


class Decoder(nn.Module):
    """A decoder-only transformer. Build it with ``loading.load.load_decoder``, or directly for random weights.

    Args:
        config: of the whole model.
        ops: the elementwise pieces, in plain torch or as Triton kernels.
        parallel: the ranks that compute the model together; this is one of them, and makes its own part.

    Raises:
        ValueError: the model cannot be cut for so many ranks.
    """

    whole_layers: WholeLayers | None = None  # all layers by one call, where that is possible
    expert_load: Tensor | None = None  # [layers with experts, E + 1], the last column for padding; if it is counted

    def __init__(self, config: ModelConfig, ops: Ops = TORCH_OPS, parallel: Collective = ALONE) -> None:
        super().__init__()
        self.config, self.ops, self.parallel = config, ops, parallel
        self.own_config = config_of_rank(config, parallel.size)  # the sizes of this rank's layers
        self.embedding = make_embedding(config.vocab_size, config.hidden_size, parallel)
        self.position_embedding = (
            Embedding(config.max_position_embeddings, config.hidden_size) if config.learned_positions else None
        )
        self.rotary = make_rotary(config)
        ropes = distinct_ropes(config)
        layers = [DecoderLayer(self.own_config, layer, ops, parallel) for layer in range(config.num_layers)]
        for layer, rope in zip(layers, config.ropes, strict=True):
            layer.rope_index = None if rope is None else ropes.index(rope)
        self.layers = nn.ModuleList(layers)
        self.final_norm = make_norm(config, ops)
        self.head = make_head(config.hidden_size, config.vocab_size, parallel)
        packed = PackedMethod(ops.pack)
        self.head.use(packed, self.dtype)
        self.use(lambda name: packed)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.final_norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.final_norm.weight.device

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, cache: Cache, step: AttentionMetadata) -> Tensor:
        """token_ids [T], positions in ``step`` [T] -> hidden states after the last norm, [T, hidden]."""
        x = self.embed(token_ids, step.positions)
        ropes = [rotary(step.positions, x.dtype) for rotary in self.rotary]
        if self.whole_layers is not None and (done := self.whole_layers(x, ropes, cache, step)) is not None:
            return self.final_norm(*done)[0]
        residual = None
        for layer in self.layers:
            index = cast(DecoderLayer, layer).rope_index
            x, residual = layer(x, residual, None if index is None else ropes[index], cache, step)
        return self.final_norm(x, residual)[0]

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Both [T] -> what enters the first layer, [T, hidden]."""
        x = self.embedding(token_ids)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        if self.config.embedding_multiplier != 1:
            x = x * self._embedding_multiplier(x.dtype)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [R, hidden] -> [R, vocab], written to ``out`` if that is given."""
        logits = self.head(hidden, out)
        if self.config.logits_scaling != 1:
            logits.div_(self.config.logits_scaling)
        if (cap := self.config.logits_softcap) is not None:
            logits.div_(cap).tanh_().mul_(cap)
        return logits

    def _embedding_multiplier(self, dtype: torch.dtype) -> float:
        """Rounded to the weights' dtype, as in transformers."""
        return torch.tensor(self.config.embedding_multiplier, dtype=dtype).item()

    def use(self, method_of: MethodOf) -> None:
        """Give each linear layer its method; their weights are then new and unset."""
        for name, linear in self.linears():
            linear.use(method_of(name), self.dtype)

    def linears(self) -> list[tuple[str, Linear]]:
        """The linear layers and their names, without the head, which is dense in every format."""
        modules = self.layers.named_modules(prefix="layers")
        return [(name, module) for name, module in modules if isinstance(module, Linear)]

    def prepack(self) -> None:
        """Lay the matrices out for the device's kernels, once the weights are final."""
        for _, linear in [*self.linears(), ("head", self.head)]:
            linear.method.prepack(linear)
        if self.config.tie_word_embeddings and isinstance(self.head.product, PanelProduct):
            self.embedding.use(self.head.product)
            del self.head.panels
        for module in self.layers.modules():
            if isinstance(module, Experts | LatentAttention):
                module.prepack()
        if self.parallel.size == 1:  # others meet between the layers' parts
            self.whole_layers = whole_layers(self.layers, self.config, self.dtype)

    def count_expert_load(self) -> None:
        """From now on, ``expert_load`` counts the tokens of each expert until it is set to zero."""
        blocks = [module for module in self.layers.modules() if isinstance(module, MoE)]
        if blocks:
            num_experts = blocks[0].router.moe.num_experts
            self.expert_load = torch.zeros(len(blocks), num_experts + 1, dtype=torch.int64, device=self.device)
            for block, load in zip(blocks, self.expert_load, strict=True):
                block.load = load

    def kv_spec(self, kv_cache_dtype: str = "auto") -> list[LayerSpec]:
        """What the cache stores for one token, layer by layer, of this rank's key and value heads.

        Args:
            kv_cache_dtype: "auto", the decoder's own, or a key of ``kernels.kv_quant.KV_DTYPES``.
        """
        config, mla, dtype = self.config, self.config.mla, KV_DTYPES.get(kv_cache_dtype, self.dtype)
        if mla is not None:
            latent = LayerSpec(1, mla.cached_dim, mla.kv_lora_rank, None, dtype, v_in_k=True)
            return [latent] * config.num_layers
        return [
            LayerSpec(
                num_kv_heads=self.own_config.num_kv_heads,
                k_dim=config.head_dim,
                v_dim=config.head_dim,
                window=window,
                dtype=dtype,
            )
            for window in config.sliding_windows
        ]
