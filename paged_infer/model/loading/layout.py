"""Which tensors of a checkpoint in Hugging Face format fill each parameter of a Decoder, for each family."""

from __future__ import annotations

from paged_infer.model.config import ModelConfig
from paged_infer.model.linear import MethodOf, Piece

HEAD = "lm_head.weight"

Layout = dict[str, tuple[Piece, ...]]


def checkpoint_layout(config: ModelConfig, method_of: MethodOf) -> Layout:
    """Our parameter name -> the checkpoint tensors that fill its rows, in order.

    Args:
        method_of: the method of each linear layer, which knows the parameters and tensors that its matrix consists of.
    """
    layout, matrices = _gpt2_layout(config) if config.family == "gpt2" else _llama_like_layout(config)
    for linear, pieces in matrices.items():
        for parameter, stored in method_of(linear).layout(pieces).items():
            layout[f"{linear}.{parameter}"] = stored
    if not config.tie_word_embeddings:
        layout["head.weight"] = (Piece(HEAD, (config.vocab_size, config.hidden_size)),)
    return layout


def _llama_like_layout(config: ModelConfig) -> tuple[Layout, Layout]:
    """Of the parameters outside the linear layers and of the biases; and of the matrices, by the layer's name."""
    hidden, wide, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_heads * dim, config.num_kv_heads * dim
    matrices: Layout = {}
    layout: Layout = {
        "embedding.weight": (Piece("model.embed_tokens.weight", (config.vocab_size, hidden)),),
        "final_norm.weight": (Piece("model.norm.weight", (hidden,)),),
    }
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
        layout[f"{ours}.attention_norm.weight"] = (Piece(f"{theirs}.input_layernorm.weight", (hidden,)),)
        layout[f"{ours}.mlp_norm.weight"] = (Piece(f"{theirs}.post_attention_layernorm.weight", (hidden,)),)
        matrices[f"{ours}.attention.qkv"] = tuple(
            Piece(f"{attention}.{name}_proj.weight", (rows[name], hidden)) for name in "qkv"
        )
        matrices[f"{ours}.attention.output"] = (Piece(f"{attention}.o_proj.weight", (hidden, q_rows)),)
        matrices[f"{ours}.mlp.up"] = tuple(
            Piece(f"{mlp}.{name}_proj.weight", (wide, hidden)) for name in ("gate", "up")
        )
        matrices[f"{ours}.mlp.down"] = (Piece(f"{mlp}.down_proj.weight", (hidden, wide)),)
        if config.qkv_bias:
            layout[f"{ours}.attention.qkv.bias"] = tuple(
                Piece(f"{attention}.{name}_proj.bias", (rows[name],)) for name in "qkv"
            )
        if config.output_bias:
            layout[f"{ours}.attention.output.bias"] = (Piece(f"{attention}.o_proj.bias", (hidden,)),)
        if config.mlp_bias:
            layout[f"{ours}.mlp.up.bias"] = tuple(Piece(f"{mlp}.{name}_proj.bias", (wide,)) for name in ("gate", "up"))
            layout[f"{ours}.mlp.down.bias"] = (Piece(f"{mlp}.down_proj.bias", (hidden,)),)
        if config.qk_norm:
            layout[f"{ours}.attention.qk_norm_weight"] = tuple(
                Piece(f"{attention}.{name}_norm.weight", (dim,)) for name in "qk"
            )
    return layout, matrices


def _gpt2_layout(config: ModelConfig) -> tuple[Layout, Layout]:
    hidden, wide = config.hidden_size, config.intermediate_size
    matrices: Layout = {}
    layout: Layout = {
        "embedding.weight": (Piece("transformer.wte.weight", (config.vocab_size, hidden)),),
        "position_embedding.weight": (Piece("transformer.wpe.weight", (config.max_position_embeddings, hidden)),),
        "final_norm.weight": (Piece("transformer.ln_f.weight", (hidden,)),),
        "final_norm.bias": (Piece("transformer.ln_f.bias", (hidden,)),),
    }
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        for our_norm, their_norm in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            for kind in ("weight", "bias"):
                layout[f"{ours}.{our_norm}.{kind}"] = (Piece(f"{theirs}.{their_norm}.{kind}", (hidden,)),)
        for our_linear, their_linear, rows, columns in (
            ("attention.qkv", "attn.c_attn", 3 * hidden, hidden),
            ("attention.output", "attn.c_proj", hidden, hidden),
            ("mlp.up", "mlp.c_fc", wide, hidden),
            ("mlp.down", "mlp.c_proj", hidden, wide),
        ):
            matrices[f"{ours}.{our_linear}"] = (Piece(f"{theirs}.{their_linear}.weight", (columns, rows), row_dim=1),)
            layout[f"{ours}.{our_linear}.bias"] = (Piece(f"{theirs}.{their_linear}.bias", (rows,)),)
    return layout, matrices
