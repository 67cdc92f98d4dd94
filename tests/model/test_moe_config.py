"""Settings of a mixture are read as transformers reads them; those that do not fit each other are refused by name."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig

from paged_infer.model.config import ModelConfig
from paged_infer.model.moe_config import MoEConfig, expected_experts

MIXTURE = {"layers": (True,), "num_experts": 8, "top_k": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "num_experts_per_tok=9: must be from 1 to the 8 experts"),
        ({"top_k": 0}, "num_experts_per_tok=0"),
        ({"num_groups": 3}, "num_experts=8: must be a multiple of n_group=3"),
        ({"num_groups": 4, "top_groups": 5}, "topk_group=5: must be from 1 to n_group=4"),
        ({"num_groups": 4, "top_groups": 1, "top_k": 3}, "the 2 experts in topk_group=1 groups"),
        ({"num_groups": 8, "top_groups": 2, "group_score": "top2_sum"}, "n_group=8: must be at most 4"),
        ({"scoring": "tanh"}, "scoring='tanh'"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused_by_name(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{**MIXTURE, **changes})


@pytest.mark.parametrize(("num_experts", "top_k", "num_tokens"), [(8, 2, 1), (8, 2, 4), (64, 6, 16), (5, 5, 3)])
def test_the_expected_number_of_experts_is_what_random_tokens_hit(num_experts, top_k, num_tokens) -> None:
    rng = random.Random(0)
    draws = [
        len({expert for _ in range(num_tokens) for expert in rng.sample(range(num_experts), top_k)})
        for _ in range(2000)
    ]
    assert expected_experts(num_experts, top_k, num_tokens) == pytest.approx(sum(draws) / len(draws), rel=0.02)


# -- Families --------------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "max_position_embeddings": 64,
}


def read(model_type: str, **changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({**SIZES, "model_type": model_type, **changes})


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_what_a_config_leaves_out_is_what_transformers_takes(family) -> None:
    ours, theirs = read(family), AutoConfig.for_model(family, **SIZES)
    assert ours.moe is not None
    assert (ours.num_kv_heads, ours.norm_eps) == (theirs.num_key_value_heads, theirs.rms_norm_eps)
    assert ours.moe.num_experts == theirs.num_experts and ours.moe.top_k == theirs.num_experts_per_tok
    width = theirs.intermediate_size if family == "mixtral" else theirs.moe_intermediate_size
    assert ours.moe.intermediate_size == width
    assert ours.moe.renormalise == getattr(theirs, "norm_topk_prob", True)
    assert ours.moe.shared_intermediate_size == getattr(theirs, "shared_expert_intermediate_size", 0)
    assert ours.ropes[0] is not None and ours.ropes[0].theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_windows == (None,) * 6
    assert ModelConfig.from_hf(theirs.to_dict()) == replace(ours, bos_token_id=theirs.bos_token_id, **ends(theirs))


def ends(theirs: Any) -> dict[str, Any]:
    return {"eos_token_ids": () if theirs.eos_token_id is None else (theirs.eos_token_id,)}


def test_sparse_steps_dense_layers_and_no_experts_choose_the_layers_of_transformers() -> None:
    layers = lambda **changes: read("qwen3_moe", **changes).moe.layers  # noqa: E731
    assert layers(decoder_sparse_step=2) == (False, True) * 3
    assert layers(decoder_sparse_step=2, mlp_only_layers=[1, 4]) == (False, False, False, True, False, True)
    assert read("qwen3_moe", num_experts=0).moe is None
    assert read("qwen2_moe", mlp_only_layers=[0, 1, 2, 3, 4, 5]).moe is None


def test_windows_are_in_the_layers_of_transformers() -> None:
    windows = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}
    theirs = AutoConfig.for_model("qwen2_moe", **SIZES, **windows).layer_types
    ours = read("qwen2_moe", **windows).sliding_windows
    assert [window is not None for window in ours] == [kind == "sliding_attention" for kind in theirs]
    assert read("qwen3_moe", **windows).sliding_windows == (9,) * 6
    assert read("mixtral", sliding_window=9).sliding_windows == (9,) * 6


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers='all'"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ("qwen3_moe", {"num_experts_per_tok": 129}, "num_experts_per_tok=129: must be from 1 to the 128 experts"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob='yes'"),
        ("qwen3_moe", {"num_experts": 4, "num_local_experts": 5}, "num_local_experts=5 contradicts num_experts=4"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts=0"),
        ("mixtral", {"num_local_experts": 2.5}, "num_local_experts=2.5"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size=0"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 6}, "no sliding_window is in use"),
        ("mixtral", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_a_family_does_not_compute_is_refused_by_name(family, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        read(family, **changes)
