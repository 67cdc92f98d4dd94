"""The method of each linear layer: by the checkpoint's own ``quantization_config``, or by ``LLM(quantization=...)``.

    quantization    None      as the checkpoint is stored: floats, or by its ``quantization_config``
                    "w8a16"   int8 weights, one scale per row
                    "w4a16"   int4 weights, group size 32, reduced where it does not divide a row (with a warning, once)
                    "w8a8"    int8 weights, one scale per row; x is rounded to int8 in each product
                    "gguf"    a GGUF file's own blocks, which are otherwise dequantised

"w8a16", "w4a16" and "w8a8" round a float checkpoint to nearest while it is loaded. Embedding, head and routers stay
floats.
"""

from __future__ import annotations

import logging

from paged_infer.kernels.op_sets import Ops
from paged_infer.model.config import ModelConfig
from paged_infer.model.linear import DENSE, LinearMethod, MethodOf, PackedMethod, Piece
from paged_infer.model.loading.gguf_file import GgufTensor
from paged_infer.model.loading.layout import checkpoint_layout
from paged_infer.model.loading.safetensors import StoredTensor
from paged_infer.model.parallel import ALONE, Collective
from paged_infer.model.quant.formats import FORMATS, Format
from paged_infer.model.quant.formats_blocks import GGUF_TYPES, Gguf, Mxfp4, Rounded
from paged_infer.model.quant.methods import QuantisedMethod
from paged_infer.model.quant.scheme import Scheme
from paged_infer.model.quant.sensitivity import ALWAYS_WIDE
from paged_infer.model.quantization_config import QuantizationConfig

logger = logging.getLogger(__name__)

_STAY_DENSE = ("router.gate", "shared_gate")  # in every format


def choose_methods(
    config: ModelConfig, quantization: str | None, stored: list[StoredTensor], ops: Ops, parallel: Collective = ALONE
) -> MethodOf:
    """The method of each linear layer, by its name.

    Args:
        stored: the checkpoint's tensors; empty for random weights.
        ops: the device's kernels, which pack the weights.
        parallel: the rank whose parts of the matrices the methods hold.

    Raises:
        ValueError: ``quantization`` is unknown or does not suit the checkpoint, or a layer cannot be stored in its
            format.
    """
    packed = PackedMethod(ops.pack)
    own = config.quantization
    if own is not None and quantization is not None:
        raise ValueError(f"quantization={quantization!r}: the checkpoint is quantised already, by {own.method!r}")
    if own is None and quantization is None:
        return lambda name: packed
    formats = dict[str, Format]()
    matrices = _matrices(config, parallel)
    if own is not None:
        formats = _configured(own, matrices)
    elif quantization == "gguf":
        formats = _kept(matrices, stored)
    else:
        if quantization not in _ROUNDED:
            raise ValueError(f"quantization={quantization!r}: must be one of {', '.join((*_ROUNDED, 'gguf'))}")
        rounded = _ROUNDED[quantization]()
        formats = {name: rounded for name in matrices if not name.endswith(ALWAYS_WIDE)}
    if config.tie_word_embeddings:
        logger.warning("the head is tied to the embedding: both stay floats")
    methods = dict[str, LinearMethod]()
    for name, form in formats.items():
        methods[name] = QuantisedMethod(form, matrices[name], ops.pack_quantised)
    return lambda name: methods.get(name, packed)


_ROUNDED = {
    "w8a16": lambda: Rounded(Scheme(8)),
    "w4a16": lambda: Rounded(Scheme(4, strategy="group", group_size=32)),
    "w8a8": lambda: Rounded(Scheme(8), "int8"),
}


def _matrices(config: ModelConfig, parallel: Collective) -> dict[str, tuple[Piece, ...]]:
    """Name of a linear layer -> the rank's parts of the matrices that are stacked in it."""
    found = dict[str, tuple[Piece, ...]]()

    class Listing:
        def __init__(self, name: str) -> None:
            self.name = name

        def layout(self, pieces: tuple[Piece, ...]) -> dict[str, tuple[Piece, ...]]:
            found[self.name] = pieces
            return DENSE.layout(pieces)

    checkpoint_layout(config, Listing, parallel)  # type: ignore[arg-type]
    return found


def _configured(own: QuantizationConfig, matrices: dict[str, tuple[Piece, ...]]) -> dict[str, Format]:
    formats = dict[str, Format]()
    for name, pieces in matrices.items():
        if name.endswith(_STAY_DENSE):
            continue
        modules = [piece.name.removesuffix(".weight") for piece in pieces]
        stored = [own.of(module) for module in modules]
        if odd := [i for i, one in enumerate(stored) if one != stored[0]]:
            raise ValueError(
                f"quantization_config: {modules[odd[0]]} is not stored as {modules[0]} is, "
                "but both are rows of one matrix here"
            )
        if stored[0] is not None:
            formats[name] = Mxfp4(stored[0]) if stored[0].kind == "mxfp4" else FORMATS[stored[0].kind](stored[0])
    return formats


def _kept(matrices: dict[str, tuple[Piece, ...]], stored: list[StoredTensor]) -> dict[str, Format]:
    """The formats of the matrices whose blocks are kept; those of other types become floats, with a warning."""
    if not stored or not all(isinstance(tensor, GgufTensor) for tensor in stored):
        raise ValueError("quantization='gguf': the checkpoint is not a GGUF file")
    types = {tensor.name: tensor.tensor_type for tensor in stored if isinstance(tensor, GgufTensor)}
    formats, others = dict[str, Format](), set[str]()
    for name, pieces in matrices.items():
        its_types = {piece.name: types.get(piece.name, "missing") for piece in pieces}
        if unknown := set(its_types.values()) - GGUF_TYPES.keys():
            others |= unknown
        else:
            formats[name] = Gguf(its_types)
    if others:
        logger.warning("quantization='gguf': matrices of type %s become floats", ", ".join(sorted(others)))
    return formats
