"""``fused.moe``'s experts on a CPU: pairs sorted by expert in C, and one product a segment in ``linear.c``'s panels.

32 experts of width 256, k = 4, hidden size 512, 32 tokens, one thread: the loop computes 1,600 tokens a
second, sorted segments in torch 1,800, in C 4,100; at 256 tokens 9,900, 10,800 and 19,200.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paged_infer.kernels.cpu.build import library, unavailable_reason
from paged_infer.kernels.cpu.linear import PanelProduct
from paged_infer.kernels.fused.moe import ExpertsProduct, ExpertWeights, sort_experts


def pack_experts_c(weights: ExpertWeights) -> ExpertsProduct:
    """float32 in C, packed in place, so the weights are overwritten; other dtypes and devices by ``sort_experts``."""
    up = weights.up
    if not up.is_cpu or up.dtype is not torch.float32 or unavailable_reason() is not None:
        return sort_experts(weights)
    with torch.inference_mode(False), torch.no_grad():
        stacks = PanelStack.of(up, weights.up_bias), PanelStack.of(weights.down, weights.down_bias)
    return PanelExperts(*stacks, weights.glu)


@dataclass(frozen=True, slots=True, eq=False)
class PanelStack:
    """E matrices [out, in] in panels (``linear.c``), one after the other."""

    panels: Tensor  # [E, ceil(out / WIDE), in, WIDE]
    start: Tensor  # [E, ceil(out / WIDE) * WIDE] the biases, or zeros
    bias: Tensor | None  # [E, out]
    height: int  # out

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> PanelStack:
        num_experts, height, depth = weight.shape
        wide = library().panel_width()
        num_panels = -(-height // wide)
        start = weight.new_zeros(num_experts, num_panels * wide)
        if bias is not None:
            start[:, :height] = bias.detach()
        weight = weight.detach().contiguous()
        is_whole = height % wide == 0  # without padding, panels take the memory of their rows
        shape = num_experts, num_panels, depth, wide
        panels = weight.view(shape) if is_whole else weight.new_empty(shape)
        for expert, matrix in enumerate(weight):
            packed = PanelProduct.of(matrix, None, reuse=True)
            if not is_whole:
                panels[expert] = packed.panels
        return cls(panels, start, bias, height)

    @property
    def weight(self) -> Tensor:
        """The matrices [E, out, in], a copy."""
        return self.panels.transpose(2, 3).flatten(1, 2)[:, : self.height].contiguous()

    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [P, in], sorted by expert, with the ends of the segments [E] -> [P, out]."""
        num_experts, depth = self.panels.shape[0], self.panels.shape[2]
        out = rows.new_empty(rows.shape[0], self.height)
        library().grouped_linear(
            out.data_ptr(), rows.data_ptr(), self.panels.data_ptr(), self.start.data_ptr(), ends.data_ptr(),
            num_experts, depth, self.height, rows.stride(0), torch.get_num_threads(),
        )  # fmt: skip
        return out


@dataclass(frozen=True, slots=True, eq=False)
class PanelExperts:
    """The product of ``pack_experts_c``."""

    up: PanelStack
    down: PanelStack
    glu: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        if not (x.is_cpu and x.dtype is torch.float32 and scores.dtype is torch.float32 and ids.dtype is torch.int64):
            up, down = self.up, self.down
            return sort_experts(ExpertWeights(up.weight, down.weight, self.glu, up.bias, down.bias))(x, ids, scores)
        ids, scores = ids.contiguous(), scores.contiguous()
        num_tokens, top_k = ids.shape
        num_experts = self.up.panels.shape[0]
        ends, place, token = ids.new_empty(num_experts), torch.empty_like(ids), ids.new_empty(ids.numel())
        library().expert_segments(
            ends.data_ptr(), place.data_ptr(), token.data_ptr(), ids.data_ptr(), ids.numel(), top_k, num_experts
        )
        rows = self.down(self.glu(self.up(_gathered(x, token), ends)), ends)
        out = x.new_empty(num_tokens, rows.shape[1])
        library().expert_sum(
            out.data_ptr(), rows.data_ptr(), place.data_ptr(), scores.data_ptr(),
            num_tokens, top_k, rows.shape[1], torch.get_num_threads(),
        )  # fmt: skip
        return out


def _gathered(x: Tensor, token: Tensor) -> Tensor:
    """Rows of x; in a padded tensor where rows of this length would compete for the same cache sets."""
    depth = x.shape[1]
    if depth % 1024 or token.numel() <= 4:
        return x.index_select(0, token)
    rows = x.new_empty(token.numel(), depth + 16)[:, :depth]
    return torch.index_select(x, 0, token, out=rows)
