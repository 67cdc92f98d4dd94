"""Muon: momentum whose matrix updates are made orthogonal, so that every direction learns at the same pace.

Keller Jordan et al., https://kellerjordan.github.io/posts/muon/. Here matrices of one shape are stacked and
orthogonalized together, which on a CPU is several times faster than one by one.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly the closest orthogonal matrices to `matrices` [N, R, C], R <= C, by a quintic Newton-Schulz iteration.

    The result's singular values lie between about 0.7 and 1.2, which is all that an update needs.
    """
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay; parameters must be matrices.

    An update has the root mean square `0.2 * lr`, as AdamW's has about (Liu et al., 2025, "Muon is scalable").
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1.0 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"])
                if update.shape[0] > update.shape[1]:
                    update = update.T
                by_shape[tuple(update.shape)].append((parameter, update))
            for shape, pairs in by_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in pairs]))
                scale = 0.2 * max(shape) ** 0.5
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    parameter.add_(update if parameter.shape == shape else update.T, alpha=-group["lr"] * scale)
