"""A mixture of experts instead of an MLP (Shazeer 2017): a router chooses k of E experts for each token.

    x [T, hidden] -> Router -> ids, scores [T, k] -> Experts: the scored sum of k of E gated MLPs -> [T, hidden]
              `---> shared expert, an MLP that every token passes through (DeepSeekMoE, Dai 2024) ------^ added

A token passes through k / E of the weights. A batch hits more of them, since its tokens choose differently
(``moe_config.expected_experts``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from paged_infer.kernels.cpu.experts import PanelExperts, PanelStack
from paged_infer.kernels.cpu.linear import Product
from paged_infer.kernels.fused.moe import ExpertProducts, ExpertsProduct, ExpertWeights, blocked_linear, sort_experts
from paged_infer.kernels.op_sets import Ops
from paged_infer.model.config import ModelConfig
from paged_infer.model.layers import MLP, activate, sigmoid
from paged_infer.model.linear import Linear, LinearMethod
from paged_infer.model.moe_config import MoEConfig


class Router(nn.Module):
    """The experts of each token and their scores, by the rule that ``MoEConfig`` selects."""

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.gate = Linear(hidden_size, moe.num_experts, bias=moe.router_bias)
        self.gate.is_float32 = moe.float32_router
        self.correction_bias = nn.Parameter(torch.empty(moe.num_experts)) if moe.correction_bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> ids [T, k] int64, best first, and scores [T, k] float32."""
        return choose(self.logits(x), self.moe, self.correction_bias)

    def logits(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, E], float32."""
        return self.gate(x.float() if self.moe.float32_router else x).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """With ``float32_router`` it stays in float32, whatever the dtype of the model."""
        super()._apply(fn, recurse)
        for parameter in self.parameters() if self.moe.float32_router else ():
            parameter.data = parameter.data.float()
        return self


def choose(logits: Tensor, moe: MoEConfig, correction_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits [T, E] float32 -> ids [T, k] int64, best first, and scores [T, k].

    ``torch.topk`` breaks ties, as in transformers: of equal logits, a CPU does not always choose the first.
    """
    if moe.scoring == "softmax_of_top_k":
        best, ids = logits.topk(moe.top_k)
        return ids, best.softmax(-1)
    scores = logits.softmax(-1) if moe.scoring == "softmax" else sigmoid(logits)
    preference = scores if correction_bias is None else scores + correction_bias
    if moe.num_groups > 1:
        preference = _within_best_groups(preference, moe)
    ids = preference.topk(moe.top_k).indices
    scores = scores.gather(1, ids)
    if moe.renormalise:
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)  # DeepSeek-V3's; a softmax's sum is far from 0
    return ids, scores * moe.scaling


def _within_best_groups(preference: Tensor, moe: MoEConfig) -> Tensor:
    """[T, E] -> the same, with -inf for the experts of all but the best groups (DeepSeek-V2 section 2.2.2)."""
    groups = preference.view(len(preference), moe.num_groups, -1)
    group_scores = groups.amax(-1) if moe.group_score == "max" else groups.topk(2).values.sum(-1)
    others = torch.ones_like(group_scores, dtype=torch.bool)
    others.scatter_(1, group_scores.topk(moe.top_groups).indices, False)
    return groups.masked_fill(others[..., None], float("-inf")).flatten(1)


class ExpertStack(Linear):
    """One matrix of each expert, [E, out, in], stored as the rows of one Linear: its method loads it piece by piece.

    ``Experts`` multiplies by it.
    """

    is_stack = True
    packed: PanelStack | None = None  # in C's panels: W is held once, as the parameter ``panels``

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, num_experts * out_features, bias=bias)
        self.num_experts = num_experts

    def stacked(self) -> tuple[Tensor, Tensor | None]:
        """Weights [E, out, in] and biases [E, out]."""
        bias = None if self.bias is None else self.bias.view(self.num_experts, -1)
        return self.method.dense(self).view(self.num_experts, -1, self.in_features), bias

    def dense_parts(self) -> list[Product]:
        """The product by each expert's floats."""
        weights, biases = self.stacked()
        own = [None] * len(weights) if biases is None else [*biases]
        return [partial(blocked_linear, weight=weight, bias=bias) for weight, bias in zip(weights, own, strict=True)]

    def use(self, method: LinearMethod, dtype: torch.dtype) -> None:
        self.packed = None
        super().use(method, dtype)

    def hold(self, packed: PanelStack) -> None:
        """Drop ``weight``, which was packed. From then on, reading it makes a copy."""
        del self.weight
        self.panels = nn.Parameter(packed.panels, requires_grad=False)
        self.packed = packed

    def __getattr__(self, name: str) -> Any:  # for names that are neither attributes nor parameters
        packed = self.__dict__.get("packed")
        return super().__getattr__(name) if packed is None or name != "weight" else packed.weight.flatten(0, 1)


class Experts(nn.Module):
    """E gated MLPs. A row passes through those that the router chose; ``ops.pack_experts`` makes the product."""

    product: ExpertsProduct | None = None  # once packed
    waits = False  # the host reads the ids in each product, so no CUDA graph can hold it

    def __init__(self, config: ModelConfig, moe: MoEConfig, ops: Ops) -> None:
        super().__init__()
        self.moe, self.activation, self.ops = moe, config.activation, ops
        hidden, wide = config.hidden_size, moe.intermediate_size
        self.up = ExpertStack(moe.num_experts, hidden, 2 * wide, moe.expert_bias)  # rows of each: gate, then up
        self.down = ExpertStack(moe.num_experts, wide, hidden, moe.expert_bias)

    def glu(self, gate_up: Tensor) -> Tensor:
        """[P, 2 I] -> [P, I]."""
        if (limit := self.moe.swiglu_limit) is not None:
            gate, up = gate_up.chunk(2, dim=-1)
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return (up + 1) * (gate * sigmoid(gate * self.moe.swiglu_alpha))
        if self.activation == "silu":
            return self.ops.silu_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return activate(self.activation, gate) * up

    def weights(self) -> ExpertWeights:
        (up, up_bias), (down, down_bias) = self.up.stacked(), self.down.stacked()
        return ExpertWeights(up, down, self.glu, up_bias, down_bias)

    def prepack(self) -> None:
        """The weights are final: lay them out for the device's kernels."""
        count = self.moe.num_experts
        up, down = (stack.method.parts(stack, count) for stack in (self.up, self.down))
        if up is None and down is None:
            self.product = self.ops.pack_experts(self.weights())
            if isinstance(self.product, PanelExperts):
                self.up.hold(self.product.up)
                self.down.hold(self.product.down)
            return
        up, down = up or self.up.dense_parts(), down or self.down.dense_parts()  # one of them may be of floats
        self.product, self.waits = sort_experts(ExpertProducts(up, down, self.glu)), True

    def forward(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        """x [T, hidden], ids and scores [T, k] -> [T, hidden]; an id of -1 adds nothing."""
        product = self.product or sort_experts(self.weights())
        return product(x, ids, scores)


class MoE(nn.Module):
    """Router, experts and, if there is one, the shared expert: [T, hidden] -> [T, hidden], as ``MLP``.

    Attributes:
        load: [E + 1], counts of the tokens that chose each expert, and of those that pad; None: they are not counted.
    """

    load: Tensor | None = None

    def __init__(self, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None and moe.layers[layer]
        self.router = Router(config.hidden_size, moe)
        self.experts = Experts(config, moe, ops)
        self.shared = self.shared_gate = None
        if moe.shared_intermediate_size:
            self.shared = MLP(replace(config, intermediate_size=moe.shared_intermediate_size), ops)
            self.shared_gate = Linear(config.hidden_size, 1, bias=False) if moe.shared_gate else None

    def forward(self, x: Tensor, slots: Tensor | None = None) -> Tensor:
        """x [T, hidden] -> [T, hidden].

        Args:
            slots: [T]; rows with slot -1, which pad a CUDA graph's batch, are routed nowhere and read no expert. None
                or empty: every row is routed.
        """
        ids, scores = self.router(x)
        if slots is not None and len(slots):
            ids = ids.masked_fill(slots[:, None] < 0, -1)
        if self.load is not None:
            experts = ids.flatten() % len(self.load)  # -1: the last
            self.load.scatter_add_(0, experts, torch.ones_like(experts))
        out = self.experts(x, ids, scores)
        if self.shared is None:
            return out
        shared = self.shared(x)
        return out + (shared if self.shared_gate is None else sigmoid(self.shared_gate(x)) * shared)


def balance_loss(logits: Tensor, top_k: int) -> Tensor:
    """The loss that keeps a router from choosing few experts: E * sum over i of f_i * P_i, a scalar.

    f_i is the share of tokens that choose expert i, and P_i the mean of its probability (Switch Transformer, Fedus
    2022, equations 4 to 6, where k = 1). An even choice gives k, and a router that sends all tokens to the same k
    experts up to E. Only P has a gradient. transformers computes it for the tokens of all layers together, and adds
    it to the training loss, times ``router_aux_loss_coef``.

    Args:
        logits: of the router, [T, E].
    """
    probs = logits.float().softmax(-1)
    num_tokens, num_experts = logits.shape
    chosen = probs.topk(top_k).indices.flatten()
    share = torch.bincount(chosen, minlength=num_experts) / num_tokens
    return num_experts * (share * probs.mean(0)).sum()
