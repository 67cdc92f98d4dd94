"""Write a quantised decoder as a folder in compressed-tensors' formats, which transformers and vLLM load, too.

    pack-quantized   weight-only   weight_packed int32 [N, K b / 32], code i at bit b i; weight_scale [N, G] or [N, 1];
                                   weight_shape; asymmetric: weight_zero_point int32 [N b / 32, G], packed along N
    int-quantized    W8A8          weight int8 [N, K]; weight_scale [N, G] or [N, 1]; asymmetric: weight_zero_point
                                   int8, as weight_scale; inputs rounded per token

Weights of 8 bits are packed, too, if inputs are not rounded: vLLM loads them in no other form, and transformers loads
experts in no other.

Sources, read: compressed-tensors 0.20.1, ``compressors/pack_quantized`` and ``quantization/utils/helpers.py``; vLLM
0.32, ``compressed_tensors.py``; transformers 5.23, ``integrations/compressed_tensors.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paged_infer.kernels.quant.weight import QuantisedWeight, unpack_int4
from paged_infer.model.config import ModelConfig
from paged_infer.model.decoder import Decoder
from paged_infer.model.linear import Piece
from paged_infer.model.loading.layout import HEAD
from paged_infer.model.loading.load import checkpoint_views
from paged_infer.model.loading.safetensors import write_tensors
from paged_infer.model.loading.targets import targets_of
from paged_infer.model.quant.scheme import Scheme
from paged_infer.model.quant.words import pack_words


def check_can_save(config: ModelConfig) -> None:
    """Raises ValueError for a quantised checkpoint, or a model whose matrices are not ``nn.Linear`` in transformers."""
    if config.quantization is not None:
        raise ValueError(f"the checkpoint is quantised already, by {config.quantization.method!r}")
    if config.family == "gpt_oss":
        raise ValueError(
            "gpt_oss cannot be quantised: it stores all experts as one tensor, which compressed-tensors cannot target"
        )
    if config.family == "gpt2":
        raise ValueError("gpt2 cannot be quantised: its Conv1D layers are not targets of compressed-tensors")


def save_quantised(
    folder: Path,
    config: Mapping[str, Any],
    decoder: Decoder,
    quantised: Mapping[str, QuantisedWeight],
    scheme: Scheme,
    *,
    rounds_inputs: bool = False,
) -> None:
    """Write config.json and model.safetensors to ``folder``.

    Tensors that are not quantised keep their values, in the first of bfloat16, float16 and float32 that holds them
    exactly.

    Args:
        folder: an existing folder.
        config: the float checkpoint's config.json.
        decoder: the decoder that ``quantise_decoder`` has quantised.
        quantised: its result: the quantised weight of each linear layer by name.
        scheme: the integer scheme of these weights; transformers 5.23 loads only symmetric ones.
        rounds_inputs: inputs are to be rounded to int8, token by token (W8A8).

    Raises:
        OSError: the folder cannot be written to.
    """
    names = {linear: name for name, linear in decoder.linears()}
    is_packed = _is_packed(scheme, rounds_inputs)
    dense, tensors, ignore = checkpoint_views(decoder), dict[str, Tensor](), [HEAD.removesuffix(".weight")]
    for name, target in targets_of(decoder).items():
        layer = names.get(target.module, "")  # type: ignore[call-overload]
        if target.parameter == "weight" and layer in quantised:
            tensors |= _compressed(name, quantised[layer], target.rows, target.piece, is_packed)
        else:
            tensors[name] = _smallest(dense[name])
            if target.parameter == "weight" and layer:
                ignore.append(name.removesuffix(".weight"))
    write_tensors(folder / "model.safetensors", tensors)
    section = quantization_config(scheme, ignore, rounds_inputs=rounds_inputs)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}, indent=2) + "\n")


def quantization_config(scheme: Scheme, ignore: Iterable[str], *, rounds_inputs: bool) -> dict[str, Any]:
    """The section ``quantization_config`` of config.json. ``ignore``: names of the layers that are not quantised."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    form = "pack-quantized" if _is_packed(scheme, rounds_inputs) else "int-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if rounds_inputs else None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": list(ignore),
        "config_groups": {"group_0": {**group, "format": form}},
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def _compressed(name: str, weight: QuantisedWeight, rows: slice, piece: Piece, is_packed: bool) -> dict[str, Tensor]:
    """The tensors of one matrix, whose rows are some of ``weight``'s, in the checkpoint's order.

    Args:
        is_packed: into words, as codes of 0 and more; otherwise signed codes in int8.
    """
    assert weight.columns is None and not weight.values.is_floating_point()
    values, scales, module = weight.values[rows], weight.scales[rows], name.removesuffix(".weight")
    middle = 2 ** (weight.bits - 1) if is_packed else 0
    codes = unpack_int4(values) if weight.is_packed else values.int() + middle
    zeros = None if weight.zeros is None else weight.zeros[rows]  # as the codes are: signed, unless they are in pairs
    if zeros is not None and not weight.is_packed:
        zeros = zeros + middle
    if piece.order is not None:
        order = torch.tensor(piece.order).argsort()
        codes, scales, zeros = codes[order], scales[order], None if zeros is None else zeros[order]
    tensors = {f"{module}.weight_scale": scales}
    if not is_packed:
        tensors[name] = codes.to(torch.int8)
        return tensors if zeros is None else {**tensors, f"{module}.weight_zero_point": zeros.to(torch.int8)}
    tensors[f"{module}.weight_packed"] = pack_words(codes, weight.bits)
    tensors[f"{module}.weight_shape"] = torch.tensor([len(codes), codes.shape[1]])
    if zeros is not None:
        tensors[f"{module}.weight_zero_point"] = pack_words(zeros.t(), weight.bits).t()
    return tensors


def _is_packed(scheme: Scheme, rounds_inputs: bool) -> bool:
    return scheme.bits < 8 or not rounds_inputs


def _smallest(tensor: Tensor) -> Tensor:
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return tensor.to(dtype)
    return tensor
