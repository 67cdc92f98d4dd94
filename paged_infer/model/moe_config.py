"""MoEConfig: the settings that make one mixture of experts Mixtral's, Qwen's, DeepSeek's or gpt-oss's."""

from __future__ import annotations

from dataclasses import dataclass

SCORINGS = ("softmax", "sigmoid", "softmax_of_top_k")
GROUP_SCORES = ("max", "top2_sum")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Which layers have experts, how a token chooses them, and what each computes. Widths in elements.

    Attributes:
        layers: for each layer, whether it has experts instead of an MLP.
        num_experts, top_k: E routed experts, of which a token passes through k.
        intermediate_size: I, the width of one expert.
        scoring: "softmax" over all experts, "sigmoid" of each (DeepSeek-V3), or "softmax_of_top_k", over the k largest
            logits alone (gpt-oss).
        renormalise: divide the k scores by their sum (``norm_topk_prob``).
        scaling: the k scores times this (``routed_scaling_factor``).
        num_groups, top_groups, group_score: experts are chosen from the ``top_groups`` best of ``num_groups`` equal
            groups, a group's score being its largest ("max", DeepSeek-V2) or its two largest added ("top2_sum", V3).
        correction_bias: a learned [E] is added to the scores for the choice alone (DeepSeek-V3 section 2.1.2).
        router_bias: of the router's matrix (gpt-oss).
        float32_router: the router's weights and products are float32 whatever the dtype (DeepSeek).
        shared_intermediate_size: width of an MLP that every token passes through; 0: none.
        shared_gate: its output is multiplied by the sigmoid of one more logit (Qwen2-MoE).
        expert_bias: of the experts' matrices (gpt-oss).
        swiglu_limit, swiglu_alpha: gpt-oss's (up + 1) * gate * sigmoid(alpha * gate), with gate at most the limit and
            up within +-limit, instead of the model's activation; no limit: the model's.
    """

    layers: tuple[bool, ...]
    num_experts: int
    top_k: int
    intermediate_size: int
    scoring: str = "softmax"
    renormalise: bool = False
    scaling: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    correction_bias: bool = False
    router_bias: bool = False
    float32_router: bool = False
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    expert_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that do not fit each other, under transformers' names."""
        if self.scoring not in SCORINGS or self.group_score not in GROUP_SCORES:
            known = f"must be one of {', '.join(SCORINGS)}, and one of {', '.join(GROUP_SCORES)}"
            raise ValueError(f"scoring={self.scoring!r}, group_score={self.group_score!r}: {known}")
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_experts={self.num_experts}: must be a multiple of n_group={self.num_groups}")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"topk_group={self.top_groups}: must be from 1 to n_group={self.num_groups}")
        in_groups = self.num_experts // self.num_groups * self.top_groups
        if not 1 <= self.top_k <= in_groups:
            of_groups = f" in topk_group={self.top_groups} groups" if self.num_groups > 1 else ""
            raise ValueError(f"num_experts_per_tok={self.top_k}: must be from 1 to the {in_groups} experts{of_groups}")
        if self.group_score == "top2_sum" and self.num_groups > 1 and self.num_experts // self.num_groups < 2:
            most = self.num_experts // 2
            raise ValueError(f"n_group={self.num_groups}: must be at most {most}, for groups of two experts or more")

    def expert_parameters(self, hidden_size: int) -> int:
        """Of one routed expert."""
        return self.intermediate_size * (3 * hidden_size + 2 * self.expert_bias) + self.expert_bias * hidden_size

    def num_parameters(self, hidden_size: int) -> int:
        """Of one layer's router, experts and shared expert (whose MLP has no biases)."""
        router = hidden_size + self.router_bias + self.correction_bias
        shared = 3 * hidden_size * self.shared_intermediate_size + self.shared_gate * hidden_size
        return self.num_experts * (self.expert_parameters(hidden_size) + router) + shared

    def idle_parameters(self, hidden_size: int) -> int:
        """Of all layers' experts, those that one token does not pass through."""
        return sum(self.layers) * (self.num_experts - self.top_k) * self.expert_parameters(hidden_size)


def expected_experts(num_experts: int, top_k: int, num_tokens: int) -> float:
    """How many experts ``num_tokens`` tokens hit on average if each chooses ``top_k`` at random: E (1 - (1 - k/E)^B).

    A decode step of that batch reads the weights of so many.

    >>> [round(expected_experts(128, 8, tokens)) for tokens in (1, 4, 16, 32)]
    [8, 29, 82, 112]
    """
    return num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)
