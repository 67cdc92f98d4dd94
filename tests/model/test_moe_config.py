"""Sizes of a mixture that do not fit each other are refused under transformers' names."""

from __future__ import annotations

import random

import pytest

from paged_infer.model.moe_config import MoEConfig, expected_experts

MIXTURE = {"layers": (True,), "num_experts": 8, "top_k": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "num_experts_per_tok=9: must be from 1 to the 8 experts"),
        ({"top_k": 0}, "num_experts_per_tok=0"),
        ({"num_groups": 3}, "num_experts=8 is not a multiple of n_group=3"),
        ({"num_groups": 4, "top_groups": 5}, "topk_group=5: must be from 1 to n_group=4"),
        ({"num_groups": 4, "top_groups": 1, "top_k": 3}, "the 2 experts in topk_group=1 groups"),
        ({"num_groups": 8, "top_groups": 2, "group_score": "top2_sum"}, "n_group=8: groups of one expert"),
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
