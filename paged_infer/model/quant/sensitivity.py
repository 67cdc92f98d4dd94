"""Which linear layers to leave unquantised ("wide"): those whose quantisation changes the predictions most.

Each layer is quantised alone, and KL(float || quantised) is measured on a few texts; recall and perplexity are too
coarse to rank layers. KL differs by factors of 10 and more between layers, so few texts suffice: on the storyteller
with 2 bits, one story found the same five most sensitive layers as another, and four stories chose the same layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from paged_infer.model.decoder import Decoder
from paged_infer.model.linear import Linear
from paged_infer.model.quant.calibration import Texts, divergence, log_probs
from paged_infer.model.quant.scheme import Scheme, rounded

ALWAYS_WIDE = ("router.gate", "shared_gate", "kv_up")  # gates choose and weigh whole experts; MLA uses parts of kv_up


def narrowable(decoder: Decoder) -> dict[str, Linear]:
    """The linear layers by name, without those that are never quantised (``ALWAYS_WIDE``)."""
    return {name: linear for name, linear in decoder.linears() if not name.endswith(ALWAYS_WIDE)}


def sensitivities(
    decoder: Decoder, scheme: Scheme, texts: Texts, on_linear: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """For each linear layer by name: KL(float || that layer alone rounded to nearest), in nats per token.

    Args:
        texts: token ids to compute KL on.
        on_linear: called after each linear layer.

    Raises:
        ValueError: the group size does not divide the columns of a layer, or a layer has values that are not finite.
    """
    linears = narrowable(decoder)
    for name, linear in linears.items():
        scheme.group(linear.in_features, name)
    reference = [log_probs(decoder, text) for text in texts]
    found = {}
    for name, linear in linears.items():
        weight = linear.weight.data.clone()
        linear.weight.data.copy_(rounded(weight, scheme, name))
        rows = [divergence(before, log_probs(decoder, text)) for before, text in zip(reference, texts, strict=True)]
        found[name] = torch.cat(rows).mean().item()
        linear.weight.data.copy_(weight)
        on_linear()
    return found


def stay_wide(decoder: Decoder, measured: Mapping[str, float], share: float) -> list[str]:
    """Names of the linear layers with the largest KL per weight, which together have at most ``share`` of the weights.

    Args:
        measured: the result of ``sensitivities``.
        share: of the weights of all linear layers, 0 .. 1.
    """
    sizes = {name: linear.weight.numel() for name, linear in narrowable(decoder).items()}
    room, chosen = share * sum(sizes.values()), []
    for name in sorted(sizes, key=lambda name: measured[name] / sizes[name], reverse=True):
        if sizes[name] <= room:
            chosen.append(name)
            room -= sizes[name]
    return chosen
