"""Routers and experts compute what transformers' modules compute, with every rule of the families."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from paged_infer.kernels.op_sets import C_OPS, SDPA_OPS, TORCH_OPS, Ops
from paged_infer.model.config import ModelConfig
from paged_infer.model.moe import MoE, balance_loss, choose
from paged_infer.model.moe_config import MoEConfig

HIDDEN, WIDE, SHARED = 64, 24, 40
_SIZES = {"layers": (True,), "num_experts": 8, "top_k": 3, "intermediate_size": WIDE}
_DEEPSEEK = {"n_routed_experts": 8, "moe_intermediate_size": WIDE, "n_shared_experts": 2, "first_k_dense_replace": 0}
_GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
_OUR_GROUPS: dict[str, Any] = {"num_groups": 4, "top_groups": 2, "scaling": 2.5}
# transformers' module and settings -> ours
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": (
        *("mixtral", "MixtralSparseMoeBlock"),
        {"num_local_experts": 8, "intermediate_size": WIDE},
        {"renormalise": True},
    ),
    "qwen3": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", {"num_experts": 8, "moe_intermediate_size": WIDE}, {}),
    "qwen2": (
        *("qwen2_moe", "Qwen2MoeSparseMoeBlock"),
        {
            "num_experts": 8,
            "moe_intermediate_size": WIDE,
            "shared_expert_intermediate_size": SHARED,
            "norm_topk_prob": True,
        },
        {"renormalise": True, "shared_intermediate_size": SHARED, "shared_gate": True},
    ),
    "deepseek-v2": (
        *("deepseek_v2", "DeepseekV2Moe"),
        {**_DEEPSEEK, "topk_method": "greedy", "routed_scaling_factor": 1.5},
        {"scaling": 1.5, "shared_intermediate_size": 2 * WIDE, "float32_router": True},
    ),
    "deepseek-v2-groups": (
        *("deepseek_v2", "DeepseekV2Moe"),
        {**_DEEPSEEK, **_GROUPS, "topk_method": "group_limited_greedy"},
        {**_OUR_GROUPS, "shared_intermediate_size": 2 * WIDE, "float32_router": True},
    ),
    "deepseek-v3": (
        *("deepseek_v3", "DeepseekV3MoE"),
        {**_DEEPSEEK, **_GROUPS, "norm_topk_prob": True},
        {
            **_OUR_GROUPS,
            "scoring": "sigmoid",
            "renormalise": True,
            "group_score": "top2_sum",
            "correction_bias": True,
            "shared_intermediate_size": 2 * WIDE,
            "float32_router": True,
        },
    ),
    "gpt-oss": (
        *("gpt_oss", "GptOssMLP"),
        {"num_local_experts": 8, "intermediate_size": WIDE},
        {"scoring": "softmax_of_top_k", "router_bias": True, "expert_bias": True, "swiglu_limit": 7.0},
    ),
}


def their_block(name: str) -> nn.Module:
    """A random block; large weights, so that scores differ, gates reach the clamp and groups matter."""
    model_type, block, settings, _ = CASES[name]
    config = AutoConfig.for_model(model_type, hidden_size=HIDDEN, num_experts_per_tok=3, **settings)
    config._experts_implementation = "eager"
    torch.manual_seed(3)
    module = getattr(import_module(f"transformers.models.{model_type}.modeling_{model_type}"), block)(config)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.normal_(std=0.4)
    return module.eval().requires_grad_(False)


def our_block(name: str, ops: Ops = TORCH_OPS) -> MoE:
    """The same block with the weights of ``their_block``."""
    moe = MoEConfig(**{**_SIZES, **CASES[name][3]})
    config = ModelConfig(
        family="", vocab_size=9, hidden_size=HIDDEN, intermediate_size=9, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=8, max_position_embeddings=9, moe=moe,
    )  # fmt: skip
    theirs, ours = their_block(name), MoE(config, 0, ops).requires_grad_(False)
    router, experts = theirs.router if name == "gpt-oss" else theirs.gate, theirs.experts
    weights = {"router.gate.weight": router.weight}
    up, down = experts.gate_up_proj, experts.down_proj
    if moe.expert_bias:  # gate and up alternate, and the matrices are transposed
        up = torch.cat((up[..., ::2], up[..., 1::2]), -1).mT
        bias = experts.gate_up_proj_bias
        weights["experts.up.bias"] = torch.cat((bias[:, ::2], bias[:, 1::2]), 1).flatten()
        weights |= {"experts.down.bias": experts.down_proj_bias.flatten(), "router.gate.bias": router.bias}
        down = down.mT
    weights |= {"experts.up.weight": up.flatten(0, 1), "experts.down.weight": down.flatten(0, 1)}
    if moe.correction_bias:
        weights["router.correction_bias"] = router.e_score_correction_bias
    if moe.shared_intermediate_size:
        shared = theirs.shared_expert if name == "qwen2" else theirs.shared_experts
        weights["shared.up.weight"] = torch.cat((shared.gate_proj.weight, shared.up_proj.weight))
        weights["shared.down.weight"] = shared.down_proj.weight
    if moe.shared_gate:
        weights["shared_gate.weight"] = theirs.shared_expert_gate.weight
    ours.load_state_dict(weights)
    assert sum(p.numel() for p in ours.parameters()) == moe.num_parameters(HIDDEN)
    return ours


def hidden(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def by_expert(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token by ascending id: transformers does not sort all of its choices."""
    order = ids.argsort()
    return ids.gather(1, order), scores.gather(1, order)


@pytest.mark.parametrize("name", CASES)
def test_a_router_chooses_and_weighs_as_transformers_does(name) -> None:
    theirs, x = their_block(name), hidden(200)
    _, scores, ids = (theirs.router if name == "gpt-oss" else theirs.gate)(x)
    our_ids, our_scores = by_expert(*our_block(name).router(x))
    ids, scores = by_expert(ids, scores)
    assert torch.equal(our_ids, ids) and our_ids.unique().numel() == 8
    torch.testing.assert_close(our_scores, scores)


@pytest.mark.parametrize("ops", [TORCH_OPS, SDPA_OPS, C_OPS], ids=["torch", "sdpa", "c"])
@pytest.mark.parametrize("name", CASES)
def test_a_block_equals_that_of_transformers_packed_and_not(name, ops) -> None:
    theirs, ours, x = their_block(name), our_block(name, ops), hidden(37)
    expected = theirs(x[None])
    expected = (expected[0] if isinstance(expected, tuple) else expected)[0]
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
    ours.experts.prepack()
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


def test_of_equal_logits_the_router_chooses_those_of_transformers() -> None:
    theirs, ours = their_block("qwen3"), our_block("qwen3")
    for weight in (theirs.gate.weight, ours.router.gate.weight):
        weight.data[:] = weight.data[:1].clone()  # all experts alike
    x = hidden(20)
    ids, _ = ours.router(x)
    assert torch.equal(ids, theirs.gate(x)[2])
    alone = torch.cat([ours.router(row[None])[0] for row in x])
    assert torch.equal(ids, alone)


def test_padding_is_routed_nowhere_and_gets_the_shared_expert_alone() -> None:
    ours, x = our_block("deepseek-v3"), hidden(6)
    slots = torch.tensor([4, -1, 0, 7, -1, 9])
    out = ours(x, slots)
    assert torch.equal(out[slots >= 0], ours(x)[slots >= 0])
    assert torch.equal(out[slots < 0], ours.shared(x)[slots < 0])


def test_the_load_is_the_number_of_tokens_of_each_expert() -> None:
    ours, x = our_block("mixtral"), hidden(50)
    ours(x)
    assert ours.load is None
    ours.load = torch.zeros(9, dtype=torch.int64)
    ours(x)
    ours(x[:7], torch.tensor([-1, 0, 1, 2, 3, 4, 5]))
    ids = torch.cat((ours.router(x)[0], ours.router(x[1:7])[0]))
    assert ours.load.tolist() == [*torch.bincount(ids.flatten(), minlength=8).tolist(), 3]


# -- The balance loss ------------------------------------------------------------------------------------------------


def test_the_balance_loss_by_hand() -> None:
    """Two tokens on expert 0, one on 1: E * sum f P = 2 * (2/3 * mean(.9, .6, .3) + 1/3 * mean(.1, .4, .7))."""
    probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    assert balance_loss(probs.log(), top_k=1).item() == pytest.approx(2 * (2 / 3 * 0.6 + 1 / 3 * 0.4))


def test_the_balance_loss_equals_that_of_transformers_and_is_least_where_experts_are_equal() -> None:
    logits = torch.randn(40, 8)
    theirs = load_balancing_loss_func((logits,), num_experts=8, top_k=2)
    torch.testing.assert_close(balance_loss(logits, 2), theirs)
    equal = torch.eye(8).repeat(4, 1) * 0.01
    assert balance_loss(equal, 1).item() == pytest.approx(1, rel=1e-4)
    assert balance_loss(torch.eye(8)[:1].expand(16, 8) * 50, 1).item() == pytest.approx(8)


def test_the_balance_loss_moves_a_collapsed_router_to_all_experts() -> None:
    torch.manual_seed(0)
    gate = nn.Parameter(torch.randn(8, HIDDEN) * 0.02)
    x = hidden(256) + 1.0
    gate.data[0] += 0.1  # every token prefers expert 0
    collapsed = (x @ gate.t()).argmax(-1).bincount(minlength=8).max().item()
    optimizer = torch.optim.SGD([gate], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        balance_loss(x @ gate.t(), top_k=1).backward()
        optimizer.step()
    balanced = (x @ gate.t()).argmax(-1).bincount(minlength=8).max().item()
    assert collapsed > 200 and balanced < 100


def test_the_settings_of_routing_change_the_choice() -> None:
    """Else equality with transformers would prove little."""
    logits, moe = torch.randn(50, 8) * 2, MoEConfig(**{**_SIZES, **CASES["deepseek-v3"][3]})
    bias = torch.randn(8)
    chosen = [
        choose(logits, rule, of_bias)
        for rule, of_bias in (
            (moe, bias),
            (moe, None),
            (replace(moe, num_groups=1, top_groups=1), bias),
            (replace(moe, group_score="max"), bias),
        )
    ]
    assert len({tuple(ids.flatten().tolist()) for ids, _ in chosen}) == 4


def test_deepseeks_router_stays_in_float32_in_a_model_of_bfloat16() -> None:
    """As in transformers, which keeps the bias and multiplies in float32: rounded, both would change the choice."""
    theirs, ours = their_block("deepseek-v3"), our_block("deepseek-v3")
    x = hidden(200).bfloat16()
    ours.bfloat16()
    dtypes = {name: parameter.dtype for name, parameter in ours.named_parameters()}
    assert dtypes["router.correction_bias"] == dtypes["router.gate.weight"] == torch.float32
    assert dtypes["experts.up.weight"] == dtypes["shared.down.weight"] == torch.bfloat16
    assert torch.equal(ours.router(x)[0].sort().values, theirs.gate(x)[2].sort().values)
