"""Which linear layers stay wide: those whose rounding moves the model's predictions most.

Each layer is rounded alone, and KL(float || quantised) is measured on a few texts. Recall and perplexity do not see
such differences; KL does. The layers differ by factors of 10 and more, so one story already names the same five as
another does; four choose the same layers to leave wide (measured on the storyteller with 2 bits).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from paged_infer.model.decoder import Decoder
from paged_infer.model.linear import Linear
from paged_infer.model.quant.calibration import Texts, divergence, log_probs
from paged_infer.model.quant.scheme import Scheme, rounded

ALWAYS_WIDE = ("router.gate", "shared_gate", "kv_up")  # every expert depends on the first two; MLA multiplies by parts


def narrowable(decoder: Decoder) -> dict[str, Linear]:
    """The linear layers by name, without those that no scheme rounds."""
    return {name: linear for name, linear in decoder.linears() if not name.endswith(ALWAYS_WIDE)}


def sensitivities(
    decoder: Decoder, scheme: Scheme, texts: Texts, on_linear: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """The mean KL in nats per token of ``decoder`` to itself with one linear layer rounded to nearest, for each.

    Args:
        on_linear: called after each linear layer.

    Raises:
        ValueError: the group size does not divide the columns of a layer, or one has values that are not finite.
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
    """Names of the layers with the largest KL per weight, as many as fit into ``share`` of all layers' weights."""
    sizes = {name: linear.weight.numel() for name, linear in narrowable(decoder).items()}
    room, chosen = share * sum(sizes.values()), []
    for name in sorted(sizes, key=lambda name: measured[name] / sizes[name], reverse=True):
        if sizes[name] <= room:
            chosen.append(name)
            room -= sizes[name]
    return chosen
