"""Post-training quantisation (PTQ) of a decoder by one of four methods; all but the first need calibration texts.

rtn           round to nearest
gptq          the columns after a column compensate for its rounding error
awq           columns whose inputs are large get finer steps
smoothquant   outliers of the inputs move into the weights, for W8A8

In a mixture of experts, "rtn" and "gptq" quantise each expert, GPTQ with the tokens routed to it. AWQ and SmoothQuant
would divide a norm, whose output goes to the router and to all experts, by scales that suit one matrix; they are
refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace

import torch

from paged_infer.kernels.quant.weight import QuantisedWeight, dequantise
from paged_infer.model.config import ModelConfig
from paged_infer.model.decoder import Decoder
from paged_infer.model.linear import DenseMethod
from paged_infer.model.quant.awq import awq_scales
from paged_infer.model.quant.calibration import CalibratedLayer, Texts, calibrated_layers
from paged_infer.model.quant.folding import fold, shared
from paged_infer.model.quant.gptq import gptq
from paged_infer.model.quant.scheme import Scheme, quantise
from paged_infer.model.quant.sensitivity import narrowable
from paged_infer.model.quant.smooth import smooth_scales

logger = logging.getLogger(__name__)

Quantised = dict[str, QuantisedWeight]
METHODS = ("rtn", "gptq", "awq", "smoothquant")


def quantise_decoder(
    decoder: Decoder,
    scheme: Scheme,
    method: str = "rtn",
    texts: Texts = (),
    *,
    wide: Collection[str] = (),
    on_layer: Callable[[], None] = lambda: None,
) -> Quantised:
    """Quantise the linear layers of ``decoder``, and replace their weights in place by the dequantised ones.

    Embedding, head and routers are not quantised; AWQ and SmoothQuant change norms and biases by folding scales into
    them.

    Args:
        decoder: its linear layers are dense and not packed.
        method: one of ``METHODS``.
        texts: token ids to calibrate on.
        wide: names of linear layers to leave unquantised.
        on_layer: called after each decoder layer.

    Returns:
        The quantised weight of each linear layer by name.

    Raises:
        ValueError: an unknown method or layer, a method that does not suit a mixture of experts, a group size that does
            not divide the columns, values that are not finite, or no text for a method that needs some.
    """
    linears = narrowable(decoder)
    _check(linears.keys(), scheme, method, texts, wide, decoder)
    found: Quantised = {}
    if method == "rtn":
        for index in range(len(decoder.layers)):
            names = [name for name in linears if name.startswith(f"layers.{index}.") and name not in wide]
            found |= {name: quantise(linears[name].weight, scheme, name) for name in names}
            on_layer()
        for name, weight in found.items():
            linears[name].weight.data.copy_(dequantise(weight))
        return found
    quantise_layer = {"gptq": _gptq, "awq": _awq, "smoothquant": _smoothquant}[method]
    for layer in calibrated_layers(decoder, texts):
        found |= quantise_layer(layer, scheme, [name for name in layer.linears if name in linears and name not in wide])
        on_layer()
    return found


def _gptq(layer: CalibratedLayer, scheme: Scheme, names: list[str]) -> Quantised:
    found = {}
    for name in names:
        if layer.linears[name].is_stack:
            found[name] = _gptq_experts(layer, scheme, name)
        else:
            products = layer.moments(name)[name].products  # the linear layers before it are quantised already
            found[name] = gptq(layer.linears[name].weight, products, scheme, name=name)
        layer.linears[name].weight.data.copy_(dequantise(found[name]))
    return found


def _gptq_experts(layer: CalibratedLayer, scheme: Scheme, name: str) -> QuantisedWeight:
    """Each expert with the tokens routed to it; those without any are rounded to nearest, and a warning counts them."""
    products, parts, num_unseen = layer.expert_products(name), list[QuantisedWeight](), 0
    for weight, own in zip(layer.linears[name].weight.chunk(len(products)), products, strict=True):
        unseen = not bool(own.any())
        num_unseen += unseen
        parts.append(quantise(weight, scheme, name) if unseen else gptq(weight, own, scheme, name=name))
    if num_unseen:
        logger.warning(
            "%s: no text reaches %d of %d experts, so these are rounded to nearest", name, num_unseen, len(parts)
        )
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return replace(
        parts[0],
        values=torch.cat([part.values for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat(zeros) if zeros else None,
        shape=(sum(part.shape[0] for part in parts), parts[0].shape[1]),
    )


def _awq(layer: CalibratedLayer, scheme: Scheme, names: list[str]) -> Quantised:
    for name, moments in layer.moments(*names).items():
        mean = shared(layer.module, name, moments.mean)
        if mean is not None:
            fold(layer.module, name, awq_scales(layer.linears[name].weight, mean, moments.products, scheme, name))
    return _round(layer, scheme, names)


def _smoothquant(layer: CalibratedLayer, scheme: Scheme, names: list[str]) -> Quantised:
    behind_norms = [name for name in names if name.endswith(("attention.qkv", "mlp.up"))]
    for name, moments in layer.moments(*behind_norms).items():
        largest = shared(layer.module, name, moments.largest)
        if largest is not None:
            fold(layer.module, name, smooth_scales(layer.linears[name].weight, largest))
    return _round(layer, scheme, names)


def _round(layer: CalibratedLayer, scheme: Scheme, names: list[str]) -> Quantised:
    found = {name: quantise(layer.linears[name].weight, scheme, name) for name in names}
    for name, weight in found.items():
        layer.linears[name].weight.data.copy_(dequantise(weight))
    return found


def check_method(config: ModelConfig, method: str) -> None:
    """Raises ValueError for an unknown method, or one that cannot scale the inputs of a mixture of experts."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    if config.moe is not None and method in ("awq", "smoothquant"):
        raise ValueError(
            f"method={method!r}: not for a mixture of experts, whose router and experts share one input, so no scales "
            "of it suit them all; use 'rtn' or 'gptq'"
        )


def _check(
    linears: Collection[str], scheme: Scheme, method: str, texts: Texts, wide: Collection[str], decoder: Decoder
) -> None:
    check_method(decoder.config, method)
    if method != "rtn" and not texts:
        raise ValueError(f"method={method!r}: needs texts for calibration")
    if unknown := sorted(set(wide) - set(linears)):
        example = next(iter(linears))
        raise ValueError(f"wide: {unknown[0]!r} is not a linear layer that is quantised, such as {example!r}")
    for name, linear in narrowable(decoder).items():
        assert isinstance(linear.method, DenseMethod)
        if name not in wide:
            scheme.group(linear.in_features, name)
