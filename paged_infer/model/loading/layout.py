"""Which tensors of a checkpoint in Hugging Face format fill each parameter of a Decoder, for each family."""

from __future__ import annotations

from paged_infer.model.config import ModelConfig
from paged_infer.model.layers import distinct_ropes, rotary_order
from paged_infer.model.linear import MethodOf, Piece
from paged_infer.model.loading.moe_layout import moe_pieces
from paged_infer.model.parallel import ALONE, Collective
from paged_infer.model.shard import COLUMNS, RANK_0, by_rows

HEAD = "lm_head.weight"

Layout = dict[str, tuple[Piece, ...]]
_LINEARS = ("qkv", "q_a", "q_b", "kv_a", "kv_up", "output")  # of attention


def checkpoint_layout(config: ModelConfig, method_of: MethodOf, parallel: Collective = ALONE) -> Layout:
    """Our parameter name -> the checkpoint tensors that fill its rows, in order.

    Args:
        config: of the whole model.
        method_of: the method of each linear layer, which has the parameters and tensors of its matrix.
        parallel: whose rank's parts of the tensors are named.
    """
    layout, matrices = _gpt2_layout(config) if config.family == "gpt2" else _llama_like_layout(config)
    layout = {name: _of_rank(pieces, parallel) for name, pieces in layout.items()}
    for linear, pieces in matrices.items():
        for parameter, stored in method_of(linear).layout(_of_rank(pieces, parallel)).items():
            layout[f"{linear}.{parameter}"] = stored
    if not config.tie_word_embeddings:
        layout["head.weight"] = _of_rank((_vocabulary(HEAD, config),), parallel)
    return layout


def embedding_name(config: ModelConfig) -> str:
    return "transformer.wte.weight" if config.family == "gpt2" else "model.embed_tokens.weight"


def _of_rank(pieces: tuple[Piece, ...], parallel: Collective) -> tuple[Piece, ...]:
    return tuple(piece.of_rank(parallel.rank, parallel.size) for piece in pieces)


def _vocabulary(name: str, config: ModelConfig) -> Piece:
    return Piece(name, (config.vocab_size, config.hidden_size), shard=by_rows(config.vocab_size))


def _llama_like_layout(config: ModelConfig) -> tuple[Layout, Layout]:
    """Of the parameters outside the linear layers and of the biases; and of the matrices, by the layer's name."""
    hidden = config.hidden_size
    matrices: Layout = {}
    layout: Layout = {
        "embedding.weight": (_vocabulary(embedding_name(config), config),),
        "final_norm.weight": (Piece("model.norm.weight", (hidden,)),),
    }
    orders = {rope: rotary_order(rope, config.head_dim) for rope in distinct_ropes(config)}
    plain = tuple(range(config.head_dim))
    for layer, rope in enumerate(config.ropes):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        for norm, their_norm in _norms(config).items():
            layout[f"{ours}.{norm}.weight"] = (Piece(f"{theirs}.{their_norm}.weight", (hidden,)),)
        order = None if rope is None or orders[rope] == plain else orders[rope]
        attention = _attention_pieces if config.mla is None else _latent_pieces
        for name, pieces in attention(config, f"{theirs}.self_attn", order).items():
            (matrices if name in _LINEARS else layout)[f"{ours}.attention.{name}"] = pieces
        has_experts = config.moe is not None and config.moe.layers[layer]
        for name, pieces in (moe_pieces if has_experts else _mlp_pieces)(config, f"{theirs}.mlp").items():
            (layout if name.endswith("bias") else matrices)[f"{ours}.mlp.{name}"] = pieces
    return layout, matrices


def _norms(config: ModelConfig) -> dict[str, str]:
    """Our names of a layer's norms -> the checkpoint's; ``post_attention_layernorm`` stands before the MLP in most."""
    if config.pre_norm and not config.post_norm:
        return {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    norms = {"attention_output_norm": "post_attention_layernorm", "mlp_output_norm": "post_feedforward_layernorm"}
    if config.pre_norm:
        norms |= {"attention_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
    return norms


def _attention_pieces(config: ModelConfig, theirs: str, order: tuple[int, ...] | None) -> Layout:
    """``order``: of each query and key head's rows, by ``rotary_order``."""
    hidden, dim = config.hidden_size, config.head_dim
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    orders = {name: _repeated(order, count) for name, count in heads.items()} | {"v": None}
    if config.family == "phi3":  # one matrix on disk: q, k and v, as here
        rows = sum(heads.values()) * dim
        all_rows = _stacked([(orders[name], count * dim) for name, count in heads.items()])
        shard = by_rows(*heads.values())
        stored: Layout = {"qkv": (Piece(f"{theirs}.qkv_proj.weight", (rows, hidden), order=all_rows, shard=shard),)}
    else:
        stored = {
            "qkv": tuple(
                Piece(f"{theirs}.{name}_proj.weight", (count * dim, hidden), order=orders[name], shard=by_rows(count))
                for name, count in heads.items()
            )
        }
    stored["output"] = (Piece(f"{theirs}.o_proj.weight", (hidden, config.num_heads * dim), shard=COLUMNS),)
    if config.qkv_bias:
        stored["qkv.bias"] = tuple(
            Piece(f"{theirs}.{name}_proj.bias", (count * dim,), order=orders[name], shard=by_rows(count))
            for name, count in heads.items()
        )
    if config.output_bias:
        stored["output.bias"] = (Piece(f"{theirs}.o_proj.bias", (hidden,), shard=RANK_0),)
    if config.attention_sinks:
        stored["sinks"] = (Piece(f"{theirs}.sinks", (config.num_heads,), shard=by_rows(config.num_heads)),)
    if config.qk_norm == "head":
        stored["qk_norm_weight"] = tuple(Piece(f"{theirs}.{name}_norm.weight", (dim,), order=order) for name in "qk")
    if config.qk_norm == "width":
        stored["qk_norm_weight"] = tuple(
            Piece(f"{theirs}.{name}_norm.weight", (heads[name] * dim,), order=orders[name], shard=by_rows(heads[name]))
            for name in "qk"
        )
    return stored


def _latent_pieces(config: ModelConfig, theirs: str, order: tuple[int, ...] | None) -> Layout:
    """Of ``LatentAttention``. ``order``: of the rotated rows, which are the last of each query head and of kv_a."""
    assert config.mla is not None
    mla, hidden, heads, rank = config.mla, config.hidden_size, config.num_heads, config.mla.q_lora_rank
    rotated = mla.qk_rope_head_dim
    head_rows = _stacked([(None, mla.qk_nope_head_dim), (order, rotated)])
    cached_rows = _stacked([(None, mla.kv_lora_rank), (order, rotated)])
    up_rows = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    queries = Piece(
        f"{theirs}.{'q_proj' if rank is None else 'q_b_proj'}.weight",
        (heads * mla.qk_head_dim, hidden if rank is None else rank),
        order=_repeated(head_rows, heads),
        shard=by_rows(heads),
    )
    stored: Layout = {
        "q_b": (queries,),
        "kv_a": (Piece(f"{theirs}.kv_a_proj_with_mqa.weight", (mla.cached_dim, hidden), order=cached_rows),),
        "kv_a_norm.weight": (Piece(f"{theirs}.kv_a_layernorm.weight", (mla.kv_lora_rank,)),),
        "kv_up": (Piece(f"{theirs}.kv_b_proj.weight", (up_rows, mla.kv_lora_rank), shard=by_rows(heads)),),
        "output": (Piece(f"{theirs}.o_proj.weight", (hidden, heads * mla.v_head_dim), shard=COLUMNS),),
    }
    if rank is not None:
        stored["q_a"] = (Piece(f"{theirs}.q_a_proj.weight", (rank, hidden)),)
        stored["q_a_norm.weight"] = (Piece(f"{theirs}.q_a_layernorm.weight", (rank,)),)
    if config.qkv_bias:
        stored["kv_a.bias"] = (Piece(f"{theirs}.kv_a_proj_with_mqa.bias", (mla.cached_dim,), order=cached_rows),)
        if rank is not None:
            stored["q_a.bias"] = (Piece(f"{theirs}.q_a_proj.bias", (rank,)),)
    if config.output_bias:
        stored["output.bias"] = (Piece(f"{theirs}.o_proj.bias", (hidden,), shard=RANK_0),)
    return stored


def _mlp_pieces(config: ModelConfig, theirs: str) -> Layout:
    hidden, wide = config.hidden_size, config.intermediate_size
    shard, names = by_rows(wide), [f"{theirs}.{name}_proj" for name in ("gate", "up")]
    if config.family == "phi3":  # one matrix on disk: gate and up, as here
        up = Piece(f"{theirs}.gate_up_proj.weight", (2 * wide, hidden), shard=by_rows(wide, wide))
        stored: Layout = {"up": (up,)}
    else:
        stored = {"up": tuple(Piece(f"{name}.weight", (wide, hidden), shard=shard) for name in names)}
    stored["down"] = (Piece(f"{theirs}.down_proj.weight", (hidden, wide), shard=COLUMNS),)
    if config.mlp_bias:
        stored["up.bias"] = tuple(Piece(f"{name}.bias", (wide,), shard=shard) for name in names)
        stored["down.bias"] = (Piece(f"{theirs}.down_proj.bias", (hidden,), shard=RANK_0),)
    return stored


def _repeated(order: tuple[int, ...] | None, heads: int) -> tuple[int, ...] | None:
    """The order of one head's rows -> that of all heads' rows."""
    return None if order is None else tuple(head * len(order) + row for head in range(heads) for row in order)


def _stacked(parts: list[tuple[tuple[int, ...] | None, int]]) -> tuple[int, ...] | None:
    """The orders of matrices, and their numbers of rows -> the order of the matrices stacked; None if none has one."""
    if all(order is None for order, _ in parts):
        return None
    first, rows = 0, list[int]()
    for order, count in parts:
        rows += [first + row for row in (order or range(count))]
        first += count
    return tuple(rows)


def _gpt2_layout(config: ModelConfig) -> tuple[Layout, Layout]:
    hidden, wide = config.hidden_size, config.intermediate_size
    matrices: Layout = {}
    layout: Layout = {
        "embedding.weight": (_vocabulary(embedding_name(config), config),),
        "position_embedding.weight": (Piece("transformer.wpe.weight", (config.max_position_embeddings, hidden)),),
        "final_norm.weight": (Piece("transformer.ln_f.weight", (hidden,)),),
        "final_norm.bias": (Piece("transformer.ln_f.bias", (hidden,)),),
    }
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        for our_norm, their_norm in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            for kind in ("weight", "bias"):
                layout[f"{ours}.{our_norm}.{kind}"] = (Piece(f"{theirs}.{their_norm}.{kind}", (hidden,)),)
        for our_linear, their_linear, rows, columns, shard in (
            ("attention.qkv", "attn.c_attn", 3 * hidden, hidden, by_rows(*[config.num_heads] * 3)),
            ("attention.output", "attn.c_proj", hidden, hidden, COLUMNS),
            ("mlp.up", "mlp.c_fc", wide, hidden, by_rows(wide)),
            ("mlp.down", "mlp.c_proj", hidden, wide, COLUMNS),
        ):
            matrix = Piece(f"{theirs}.{their_linear}.weight", (columns, rows), row_dim=1, shard=shard)
            bias = Piece(f"{theirs}.{their_linear}.bias", (rows,), shard=RANK_0 if shard is COLUMNS else shard)
            matrices[f"{ours}.{our_linear}"], layout[f"{ours}.{our_linear}.bias"] = (matrix,), (bias,)
    return layout, matrices
