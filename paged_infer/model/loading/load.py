"""Load a checkpoint into a Decoder; every tensor is accounted for.

``layout.checkpoint_layout`` maps each of our parameters to the checkpoint tensors that fill it, stacked by rows (the
fused QKV and gate-up matrices take several). A tensor that the layout does not name is unexpected, and one that it
names but the checkpoint lacks is missing. Either stops the load when the files' headers are read, before any memory is
allocated.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from paged_infer.kernels.cpu.large_pages import to_empty_in_large_pages, trim_heap
from paged_infer.kernels.op_sets import TORCH_OPS, Ops
from paged_infer.model.config import ModelConfig, named_dtype
from paged_infer.model.decoder import Decoder
from paged_infer.model.layers import make_rotary
from paged_infer.model.linear import MethodOf
from paged_infer.model.loading.checkpoint import check_size, config_dict, list_tensors, read_config, read_tensors
from paged_infer.model.loading.gguf_file import GgufTensor
from paged_infer.model.loading.layout import HEAD, checkpoint_layout, embedding_name
from paged_infer.model.loading.quantised import choose_methods
from paged_infer.model.loading.random_weights import fill_at_random
from paged_infer.model.loading.safetensors import StoredTensor
from paged_infer.model.loading.targets import targets_of
from paged_infer.model.parallel import ALONE, Collective
from paged_infer.model.quant.methods import QuantisedMethod
from paged_infer.model.rank_config import config_of_rank
from paged_infer.model.shard import units_of_rank
from paged_infer.model.vocabulary import rows_of_rank

logger = logging.getLogger(__name__)

MAX_PROBLEMS = 20  # listed in one error; the config of another model can cause thousands
_FLOATS = {  # as safetensors and as torch call them
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


def load_decoder(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    ops: Ops = TORCH_OPS,
    *,
    dummy_seed: int | None = None,
    method_of: MethodOf | None = None,
    max_model_len: int | None = None,
    quantization: str | None = None,
    parallel: Collective = ALONE,
) -> Decoder:
    """Read ``folder`` (config.json, one or many .safetensors), or a GGUF file, into a Decoder on ``device`` that
    computes with ``ops``.

    Args:
        dummy_seed: read the config alone, and make random weights from this seed.
        method_of: how the weights of each linear layer are stored and multiplied; None: ``quantised.choose_methods``.
        max_model_len: the longest sequence that will be computed; None: as long as the model allows.
        quantization: how linear layers are quantised while they are loaded; see ``quantised``.
        parallel: the ranks that compute the model together. Only this rank's part of each tensor is read.

    Raises:
        ValueError: ranks that do not divide the model, or the groups of its quantised weights; missing, unexpected or
            misshapen tensors (the message names up to ``MAX_PROBLEMS``), a file that cannot be read, or too little
            memory on the device.
    """
    config = replace(read_config(folder), max_model_len=max_model_len)
    _warn_about_long_factors(config)
    stored = list_tensors(folder) if dummy_seed is None else []
    if dummy_seed is not None and config.quantization is not None:
        raise ValueError("load_format='dummy': random weights in the checkpoint's quantised format are not supported")
    if dummy_seed is None:
        check_size(config, stored, str(folder))
    config_of_rank(config, parallel.size)  # refused before a layout is made
    method_of = method_of or choose_methods(config, quantization, stored, ops, parallel)
    found = match(config, method_of, stored, str(folder), parallel) if dummy_seed is None else {}
    decoder = empty_decoder(config, dtype, device, ops, method_of, parallel)
    if dummy_seed is None:
        fill(decoder, found, str(folder))
    else:
        fill_at_random(decoder, dummy_seed)
    decoder.prepack()
    trim_heap()
    return decoder


def _warn_about_long_factors(config: ModelConfig) -> None:
    """Long factors by default would be a surprise: transformers computes short texts with the short ones."""
    lengths = {rope.longrope.original_max_position for rope in config.ropes if rope is not None and rope.longrope}
    if config.max_model_len is None and lengths and config.max_position_embeddings > (short := max(lengths)):
        logger.warning(
            "LongRoPE's factors for texts longer than %d tokens are in use, for shorter ones, too; "
            "max_model_len=%d or less selects the others",
            short,
            short,
        )


def empty_decoder(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    ops: Ops,
    method_of: MethodOf,
    parallel: Collective = ALONE,
) -> Decoder:
    """A Decoder with its weights allocated, once, in their final dtype and on their device, but not set.

    Raises:
        ValueError: the device does not have enough memory.
    """
    own = replace(config_of_rank(config, parallel.size), vocab_size=rows_of_rank(config.vocab_size, parallel))
    needed, available = own.num_parameters * dtype.itemsize, available_bytes(torch.device(device))
    shown = f"{own.num_parameters} parameters as {dtype}"
    if needed > available * dtype.itemsize * 4:  # too large even at 2 bits; refused before thousands of layers are made
        raise ValueError(f"{shown} need {needed} bytes, but {device} has {available} available")
    with torch.device("meta"):
        decoder = Decoder(config, ops, parallel).to(dtype)
        decoder.use(method_of)
    for _, linear in decoder.linears():  # quantised ones take fewer bytes
        held = sum(tensor.nbytes for tensor in (*linear.parameters(), *linear.buffers()) if tensor is not linear.bias)
        needed += held - linear.in_features * linear.out_features * dtype.itemsize
    if needed > available:
        raise ValueError(f"{shown} need {needed} bytes, but {device} has {available} available")
    if torch.device(device).type == "cpu":
        quantised = [one for _, one in decoder.linears() if isinstance(one.method, QuantisedMethod)]
        codes = [tensor for one in quantised for tensor in (*one.parameters(), *one.buffers())]
        to_empty_in_large_pages(decoder, short_lived=codes)  # freed once packed: the product has its own copy
    else:
        decoder.to_empty(device=device)
    if config.tie_word_embeddings:
        decoder.head.weight = decoder.embedding.weight
    decoder.rotary = make_rotary(config).to(device)
    return decoder.eval().requires_grad_(False)


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: on a CPU, available memory and free swap, or all memory if unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        kibibytes = dict(re.findall(r"^(\w+): +(\d+) kB$", meminfo.read_text(), re.MULTILINE))
        return (int(kibibytes["MemAvailable"]) + int(kibibytes["SwapFree"])) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def saved_dtype(folder: Path) -> str:
    """The dtype of the weights in ``folder``: config.json's, or else that of the first floating-point tensor.

    Raises:
        ValueError: a dtype that this package does not compute in.
    """
    name = named_dtype(config_dict(folder))
    if name is None:
        with suppress(ValueError):  # missing or unreadable weights are reported when they are loaded
            name = next((_FLOATS[t.dtype] for t in list_tensors(folder) if t.dtype in _FLOATS), None)
    if name not in (None, "float32", "float16", "bfloat16"):
        raise ValueError(f"{folder}: saved as {name}; set dtype to float32, float16 or bfloat16")
    return name or "float32"


def match(
    config: ModelConfig, method_of: MethodOf, stored: list[StoredTensor], source: str, parallel: Collective = ALONE
) -> dict[str, StoredTensor]:
    """Map the layout's names to the stored tensors, and check that all are present and have the right shape.

    A tied pair may be stored as either tensor or both. A head stored alone is listed under the embedding's name.

    Raises:
        ValueError: tensors that are missing, unexpected, given twice, misshapen or not floating-point; the message
            names up to ``MAX_PROBLEMS`` of them.
    """
    layout = checkpoint_layout(config, method_of, parallel)
    shapes = {piece.name: piece.stored_shape for pieces in layout.values() for piece in pieces}
    floats = {piece.name for pieces in layout.values() for piece in pieces if piece.is_float} | {HEAD}
    embedding = embedding_name(config)
    needed = list(shapes)
    shapes.setdefault(HEAD, shapes[embedding])
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for tensor in stored:
        name = _canonical(tensor.name, config, shapes)
        if name not in shapes:
            if not (tensor.name.endswith(_constants(config)) or tensor.name.startswith(_left_out(config))):
                problems.append(f"unexpected tensor {tensor.name} {list(tensor.shape)}")
            continue
        if name in found:
            problems.append(f"tensor {tensor.name} is stored twice")
        elif tensor.shape != shapes[name]:
            problems.append(f"{tensor.name} is {list(tensor.shape)}, not {list(shapes[name])}")
        elif name in floats and tensor.dtype not in _FLOATS:
            problems.append(f"{tensor.name} is stored as {tensor.dtype}; weights must be floats")
        found[name] = tensor
    if config.tie_word_embeddings and embedding not in found and HEAD in found:
        found[embedding] = found.pop(HEAD)
    problems = [f"missing tensor {name} {list(shapes[name])}" for name in needed if name not in found] + problems
    if problems:
        shown = problems[:MAX_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise ValueError(f"{source}: {len(problems)} problem(s) with its weights:\n  " + "\n  ".join(shown))
    return found


def fill(decoder: Decoder, found: Mapping[str, StoredTensor], source: str) -> None:
    """Copy each tensor, or this rank's part of it, to its place in ``decoder``.

    Args:
        found: the result of ``match`` for the decoder's config.

    Raises:
        ValueError: a stored head differs from the embedding that it is tied to.
    """
    targets = targets_of(decoder)
    pieces = {name: target.piece for name, target in targets.items()}
    pieces.setdefault(HEAD, pieces[embedding_name(decoder.config)])  # tied
    found = {
        name: replace(stored, is_kept=True, cut=pieces[name].cut)
        if isinstance(stored, GgufTensor) and pieces[name].as_stored
        else replace(stored, cut=pieces[name].cut)
        for name, stored in found.items()
    }
    tied_head: Tensor | None = None
    for name, tensor in read_tensors(found):
        if name in targets:
            targets[name].load(tensor)
        else:
            tied_head = tensor
    own_tokens = units_of_rank(decoder.config.vocab_size, decoder.parallel.rank, decoder.parallel.size)
    for table in (decoder.embedding, decoder.head):
        table.weight.data[len(own_tokens) :] = 0  # padding
    if tied_head is not None and not _same(tied_head, decoder.embedding.weight[: len(tied_head)]):
        raise ValueError(
            f"{source}: 1 problem(s) with its weights:\n  "
            "lm_head.weight differs from the embedding, though tie_word_embeddings is true"
        )


def checkpoint_views(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's weights under the checkpoint's names and in its shapes: views, unless they were rearranged.

    Raises:
        ValueError: linear layers are quantised, so they have no such tensors, or this is one rank's part of a model.
    """
    if decoder.parallel.size > 1:
        raise ValueError(f"tensor_parallel_size={decoder.parallel.size}: a rank has no whole tensors; it must be 1")
    if few := [name for name, linear in decoder.linears() if isinstance(linear.method, QuantisedMethod)]:
        raise ValueError(f"{few[0]} is quantised: only a float model can be given to another engine")
    views = {}
    for name, target in targets_of(decoder).items():
        rows = getattr(target.module, target.parameter).data[target.rows]
        piece = target.piece
        if target.parameter == "qk_norm_weight":  # a weight that all heads share is repeated, one row per head
            rows = rows.view(-1) if rows.numel() == math.prod(piece.shape) else rows[0]
        rows = piece.from_rows(rows)
        if piece.order is not None:
            rows = rows.index_select(piece.row_dim, torch.tensor(piece.order, device=rows.device).argsort())
        views[name] = rows
    return views


def _same(stored: Tensor, weight: Tensor) -> bool:
    return stored.shape == weight.shape and torch.equal(stored.to(weight.device, weight.dtype), weight)


def _constants(config: ModelConfig) -> tuple[str, ...]:
    """Name endings of constants that older checkpoints store with the weights; the decoder computes them itself."""
    return (".attn.bias", ".attn.masked_bias") if config.family == "gpt2" else (".rotary_emb.inv_freq",)


def _left_out(config: ModelConfig) -> tuple[str, ...]:
    """Beginnings of names that transformers leaves out, too: DeepSeek-V3's layer that drafts a second token."""
    return ("model.layers.61.",) if config.family == "deepseek_v3" else ()


def _canonical(name: str, config: ModelConfig, known: Container[str]) -> str:
    """The layout's name: a base model saved alone lacks the prefix, and some checkpoints have a spurious one."""
    prefix = "transformer." if config.family == "gpt2" else "model."
    if name.startswith(prefix) and name.removeprefix(prefix) in known:
        return name.removeprefix(prefix)
    return prefix + name if prefix + name in known else name
