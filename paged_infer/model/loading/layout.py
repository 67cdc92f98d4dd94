"""Which tensors of a checkpoint in Hugging Face format fill each parameter of a Decoder, for each family."""

from __future__ import annotations

from dataclasses import dataclass

from paged_infer.model.config import ModelConfig

HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the checkpoint: its name there, its shape there, and whether its matrix is stored transposed."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False  # GPT-2's Conv1D keeps [in, out]


Layout = dict[str, tuple[Piece, ...]]


def checkpoint_layout(config: ModelConfig) -> Layout:
    """Our parameter name -> the checkpoint tensors that fill its rows, in order."""
    layout = _gpt2_layout(config) if config.family == "gpt2" else _llama_like_layout(config)
    if not config.tie_word_embeddings:
        layout["head.weight"] = (Piece(HEAD, (config.vocab_size, config.hidden_size)),)
    return layout


def _llama_like_layout(config: ModelConfig) -> Layout:
    hidden, wide, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_heads * dim, config.num_kv_heads * dim
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
        layout[f"{ours}.attention.qkv.weight"] = tuple(
            Piece(f"{attention}.{name}_proj.weight", (rows[name], hidden)) for name in "qkv"
        )
        layout[f"{ours}.attention.output.weight"] = (Piece(f"{attention}.o_proj.weight", (hidden, q_rows)),)
        layout[f"{ours}.mlp.up.weight"] = tuple(
            Piece(f"{mlp}.{name}_proj.weight", (wide, hidden)) for name in ("gate", "up")
        )
        layout[f"{ours}.mlp.down.weight"] = (Piece(f"{mlp}.down_proj.weight", (hidden, wide)),)
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
    return layout


def _gpt2_layout(config: ModelConfig) -> Layout:
    hidden, wide = config.hidden_size, config.intermediate_size
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
            layout[f"{ours}.{our_linear}.weight"] = (
                Piece(f"{theirs}.{their_linear}.weight", (columns, rows), transposed=True),
            )
            layout[f"{ours}.{our_linear}.bias"] = (Piece(f"{theirs}.{their_linear}.bias", (rows,)),)
    return layout
