"""Which tensors of a checkpoint fill the parameters of a mixture of experts (``model.moe.MoE``).

Ranks divide every expert, as they divide an MLP, and not the experts among themselves: whichever experts a batch
chooses, each rank has the same work, and one sum ends it. The price is narrower products.
"""

from __future__ import annotations

from paged_infer.model.config import ModelConfig
from paged_infer.model.linear import Piece
from paged_infer.model.shard import COLUMNS, RANK_0, by_rows

_SHARED = {"qwen2_moe": "shared_expert"}


def moe_pieces(config: ModelConfig, theirs: str) -> dict[str, tuple[Piece, ...]]:
    """Our linear layers and biases -> their tensors, one for each expert and projection.

    Args:
        theirs: the checkpoint's name of the layer's MLP, such as ``model.layers.3.mlp``.
    """
    moe, hidden = config.moe, config.hidden_size
    assert moe is not None
    if config.family == "gpt_oss":
        return _gpt_oss_pieces(config, theirs)
    gate, up, down = ("w1", "w3", "w2") if config.family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    if config.family == "mixtral":
        theirs = theirs.removesuffix("mlp") + "block_sparse_moe"
    experts, wide = [f"{theirs}.experts.{expert}" for expert in range(moe.num_experts)], moe.intermediate_size
    pieces = {
        "router.gate": (Piece(f"{theirs}.gate.weight", (moe.num_experts, hidden)),),
        "experts.up": tuple(
            Piece(f"{e}.{name}.weight", (wide, hidden), shard=by_rows(wide)) for e in experts for name in (gate, up)
        ),
        "experts.down": tuple(Piece(f"{e}.{down}.weight", (hidden, wide), shard=COLUMNS) for e in experts),
    }
    if moe.correction_bias:
        pieces["router.correction_bias"] = (Piece(f"{theirs}.gate.e_score_correction_bias", (moe.num_experts,)),)
    if (wide := moe.shared_intermediate_size) > 0:
        shared = f"{theirs}.{_SHARED.get(config.family, 'shared_experts')}"
        shard = by_rows(wide)
        pieces["shared.up"] = tuple(Piece(f"{shared}.{n}.weight", (wide, hidden), shard=shard) for n in (gate, up))
        pieces["shared.down"] = (Piece(f"{shared}.{down}.weight", (hidden, wide), shard=COLUMNS),)
    if moe.shared_gate:
        pieces["shared_gate"] = (Piece(f"{theirs}.shared_expert_gate.weight", (1, hidden)),)
    return pieces


def _gpt_oss_pieces(config: ModelConfig, theirs: str) -> dict[str, tuple[Piece, ...]]:
    """All experts in one tensor, transposed, where the columns of gate and up alternate."""
    moe, hidden = config.moe, config.hidden_size
    assert moe is not None
    count, wide = moe.num_experts, moe.intermediate_size
    order = (*range(0, 2 * wide, 2), *range(1, 2 * wide, 2))
    up, down = f"{theirs}.experts.gate_up_proj", f"{theirs}.experts.down_proj"
    rows = by_rows(wide, wide)
    return {
        "router.gate": (Piece(f"{theirs}.router.weight", (count, hidden)),),
        "router.gate.bias": (Piece(f"{theirs}.router.bias", (count,)),),
        "experts.up": (Piece(up, (count, hidden, 2 * wide), row_dim=2, order=order, is_stack=True, shard=rows),),
        "experts.up.bias": (Piece(f"{up}_bias", (count, 2 * wide), row_dim=1, order=order, is_stack=True, shard=rows),),
        "experts.down": (Piece(down, (count, wide, hidden), row_dim=2, is_stack=True, shard=COLUMNS),),
        "experts.down.bias": (Piece(f"{down}_bias", (count, hidden), row_dim=1, is_stack=True, shard=RANK_0),),
    }
