"""The tensors that transformers saves of a layer's experts are those of the layout, and fill the same block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from paged_infer.kernels.op_sets import TORCH_OPS
from paged_infer.model.config import ModelConfig
from paged_infer.model.linear import DENSE
from paged_infer.model.loading.moe_layout import moe_pieces
from paged_infer.model.moe import MoE
from paged_infer.model.moe_config import MoEConfig

THEIRS: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "intermediate_size": 36,
    "pad_token_id": 0,
}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 28,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "num_key_value_heads": 4,
}
_OF_DEEPSEEK = {"intermediate_size": 28, "shared_intermediate_size": 56, "num_groups": 2, "float32_router": True}
# model_type -> transformers' settings and ours, of layer 1
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deepseek_v2": ({**_DEEPSEEK, "topk_method": "group_limited_greedy"}, _OF_DEEPSEEK),
    "deepseek_v3": (
        {**_DEEPSEEK, "norm_topk_prob": True, "routed_scaling_factor": 2.0},
        {
            **_OF_DEEPSEEK,
            "scoring": "sigmoid",
            "correction_bias": True,
            "renormalise": True,
            "scaling": 2.0,
            "group_score": "top2_sum",
        },
    ),
    "gpt_oss": (
        {"num_local_experts": 4, "head_dim": 16},
        {"scoring": "softmax_of_top_k", "router_bias": True, "expert_bias": True, "swiglu_limit": 7.0},
    ),
    "mixtral": ({"num_local_experts": 4}, {"renormalise": True}),
    "qwen2_moe": (
        {"num_experts": 4, "moe_intermediate_size": 28, "shared_expert_intermediate_size": 20},
        {"intermediate_size": 28, "shared_intermediate_size": 20, "shared_gate": True},
    ),
    "qwen3_moe": ({"num_experts": 4, "moe_intermediate_size": 28}, {"intermediate_size": 28}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_fills_a_block_that_computes_the_same(family: str, tmp_path: Path) -> None:
    theirs, ours = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**THEIRS, **theirs})).eval()
    block = model.model.layers[1].mlp
    for parameter in [*block.parameters(), *block.buffers()]:
        parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")

    moe = MoEConfig(**{"layers": (False, True), "num_experts": 4, "top_k": 2, "intermediate_size": 36, **ours})
    config = ModelConfig(
        family=family, vocab_size=20, hidden_size=64, intermediate_size=36, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=16, max_position_embeddings=64, moe=moe,
    )  # fmt: skip
    pieces = moe_pieces(config, "model.layers.1.mlp")
    prefixes = ("model.layers.1.mlp.", "model.layers.1.block_sparse_moe.")
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items() if name.startswith(prefixes)}
    assert {piece.name: piece.shape for own in pieces.values() for piece in own} == shapes

    mixture = MoE(config, 1, TORCH_OPS).requires_grad_(False)
    unset = dict(mixture.named_parameters())
    for name, own in pieces.items():
        parameter = name if name.endswith("bias") else f"{name}.weight"
        module, _, leaf = parameter.rpartition(".")
        row = 0
        for piece in own:
            tensor, order = stored[piece.name], piece.order
            tensor = tensor if order is None else tensor.index_select(piece.row_dim, torch.tensor(order))
            rows = slice(row, row + piece.num_rows)
            DENSE.load(mixture.get_submodule(module), leaf, rows, piece, tensor)
            assert torch.equal(piece.from_rows(unset[parameter].data[rows]), tensor)
            row += piece.num_rows
        assert row == len(unset.pop(parameter))
    assert not unset
    x = torch.randn(9, 64)
    with torch.no_grad():
        expected = block(x[None])
    torch.testing.assert_close(mixture(x), (expected[0] if family == "gpt_oss" else expected)[0], rtol=1e-4, atol=1e-4)
