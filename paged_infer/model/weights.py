"""From a checkpoint in Hugging Face format to a Decoder, every tensor accounted for.

``checkpoint_layout`` is the whole story: for each of our parameters, the checkpoint tensors that fill it, stacked by
rows (the fused QKV and gate-up matrices are several tensors of the checkpoint). What the table does not name is an
unexpected tensor; what it names and the checkpoint lacks is a missing one; both stop the load.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from paged_infer.kernels.ops import TORCH_OPS, Ops
from paged_infer.model.config import ModelConfig, read_json
from paged_infer.model.decoder import Decoder

# Constants that older checkpoints carry beside their weights; the decoder computes them itself.
_CONSTANT_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the checkpoint: its name there, its shape there, and whether its matrix is stored transposed."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False  # GPT-2's Conv1D keeps [in, out]


Layout = dict[str, tuple[Piece, ...]]


def load_decoder(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    ops: Ops = TORCH_OPS,
    *,
    dummy_seed: int | None = None,
) -> Decoder:
    """Read ``folder`` (config.json, one or many .safetensors) into a Decoder on ``device`` that computes with ``ops``.

    Args:
        dummy_seed: read config.json alone, and make random weights from this seed.

    Raises:
        ValueError: naming every missing, unexpected or misshapen tensor, or the file that cannot be read.
    """
    config = ModelConfig.from_pretrained(folder)
    decoder = empty_decoder(config, dtype, device, ops)
    if dummy_seed is None:
        fill(decoder, read_tensors(folder), source=str(folder))
    else:
        fill_at_random(decoder, dummy_seed)
    decoder.prepack()
    return decoder


def empty_decoder(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str, ops: Ops = TORCH_OPS
) -> Decoder:
    """A Decoder whose weights are allocated once, in their final dtype and place, and not yet set."""
    with torch.device("meta"):
        decoder = Decoder(config, ops).to(dtype)
    decoder.to_empty(device=device)
    if config.tie_word_embeddings:
        decoder.head.weight = decoder.embedding.weight
    if decoder.rotary is not None:  # a float32 constant, not a weight: computed on the CPU, alike everywhere
        decoder.rotary = type(decoder.rotary)(config).to(device)
    return decoder.eval().requires_grad_(False)


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, one at a time, as stored."""
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: cannot be read as safetensors, perhaps truncated ({error})") from None


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors; a ValueError that names those that are not there."""
    index_path = folder / "model.safetensors.index.json"
    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index_path}: lacks 'weight_map', so it names no weight files")
        paths = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        paths = [folder / "model.safetensors"]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{folder}: weight file {', '.join(missing)} is not there (only safetensors are read)"
        )
    return paths


def fill(decoder: Decoder, tensors: Iterator[tuple[str, Tensor]], source: str) -> None:
    """Copy each checkpoint tensor to its place in ``decoder``.

    Raises:
        ValueError: naming every tensor that is missing, unexpected, given twice or misshapen.
    """
    targets = _targets(decoder)
    seen: set[str] = set()
    problems: list[str] = []
    tied_head: Tensor | None = None
    for stored_name, tensor in tensors:
        name = _canonical(stored_name, decoder.config)
        if stored_name.endswith(_CONSTANT_SUFFIXES):
            continue
        if name == "lm_head.weight" and decoder.config.tie_word_embeddings:
            tied_head = tensor
        elif name not in targets:
            problems.append(f"unexpected tensor {stored_name} {list(tensor.shape)}")
        elif name in seen:
            problems.append(f"tensor {stored_name} is there twice")
        elif tuple(tensor.shape) != targets[name][1].shape:
            problems.append(f"{stored_name} is {list(tensor.shape)}, not {list(targets[name][1].shape)}")
            seen.add(name)
        else:
            target, piece = targets[name]
            target.copy_(tensor.t() if piece.transposed else tensor)
            seen.add(name)
    problems += [
        f"missing tensor {name} {list(targets[name][1].shape)}" for name in targets if name not in seen
    ]
    if tied_head is not None and not _same(tied_head, decoder.embedding.weight):
        problems.append("lm_head.weight differs from the embedding, though tie_word_embeddings is true")
    if problems:
        raise ValueError(
            f"{source}: {len(problems)} problem(s) with its weights:\n  " + "\n  ".join(problems)
        )


@torch.inference_mode()
def fill_at_random(decoder: Decoder, seed: int) -> None:
    """Matrices normal with a deviation of 0.02, norms 1, biases 0: drawn in place, on the decoder's device."""
    generator = torch.Generator(decoder.device).manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02, generator=generator)


def checkpoint_views(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's weights under the checkpoint's names and in its shapes: views, so nothing is copied."""
    views = {}
    for name, (rows, piece) in _targets(decoder).items():
        if piece.transposed:
            views[name] = rows.t()
        else:  # a norm's weight that all heads share stands in one row for each of them
            views[name] = rows if rows.dim() == len(piece.shape) else rows[0]
    return views


def _same(stored: Tensor, weight: Tensor) -> bool:
    return stored.shape == weight.shape and torch.equal(stored.to(weight.device, weight.dtype), weight)


def _canonical(name: str, config: ModelConfig) -> str:
    """GPT-2's first checkpoints have no "transformer." in front."""
    if config.family == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        return f"transformer.{name}"
    return name


def _targets(decoder: Decoder) -> dict[str, tuple[Tensor, Piece]]:
    """Checkpoint name -> the view of our parameter that it fills, and what it must look like."""
    parameters: dict[str, nn.Parameter] = dict(decoder.named_parameters())
    targets: dict[str, tuple[Tensor, Piece]] = {}
    for our_name, pieces in checkpoint_layout(decoder.config).items():
        parameter, row = parameters.pop(our_name), 0
        for piece in pieces:
            rows = piece.shape[-1] if piece.transposed else piece.shape[0]
            if parameter.dim() == 2 and len(piece.shape) == 1:  # one norm weight, shared by a run of heads
                rows = _heads_of(piece, decoder.config)
            targets[piece.name] = parameter.data[row : row + rows], piece
            row += rows
        assert row == parameter.shape[0], f"layout of {our_name} covers {row} of {parameter.shape[0]} rows"
    assert not parameters, f"layout names no source for {sorted(parameters)}"
    return targets


def _heads_of(piece: Piece, config: ModelConfig) -> int:
    return config.num_heads if "q_norm" in piece.name else config.num_kv_heads


def checkpoint_layout(config: ModelConfig) -> Layout:
    """Our parameter name -> the checkpoint tensors that fill its rows, in order."""
    layout = _gpt2_layout(config) if config.family == "gpt2" else _llama_like_layout(config)
    if not config.tie_word_embeddings:
        layout["head.weight"] = (Piece("lm_head.weight", (config.vocab_size, config.hidden_size)),)
    return layout


def _llama_like_layout(config: ModelConfig) -> Layout:
    hidden, wide, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_heads * dim, config.num_kv_heads * dim
    layout: Layout = {
        "embedding.weight": (Piece("model.embed_tokens.weight", (config.vocab_size, hidden)),),
        "final_norm.weight": (Piece("model.norm.weight", (hidden,)),),
    }
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
        layout[f"{ours}.attention_norm.weight"] = (Piece(f"{theirs}.input_layernorm.weight", (hidden,)),)
        layout[f"{ours}.mlp_norm.weight"] = (Piece(f"{theirs}.post_attention_layernorm.weight", (hidden,)),)
        layout[f"{ours}.attention.qkv.weight"] = tuple(
            Piece(f"{attention}.{name}_proj.weight", (rows[name], hidden)) for name in "qkv"
        )
        layout[f"{ours}.attention.output.weight"] = (Piece(f"{attention}.o_proj.weight", (hidden, q_rows)),)
        layout[f"{ours}.mlp.up.weight"] = tuple(
            Piece(f"{mlp}.{name}_proj.weight", (wide, hidden)) for name in ("gate", "up")
        )
        layout[f"{ours}.mlp.down.weight"] = (Piece(f"{mlp}.down_proj.weight", (hidden, wide)),)
        if config.qkv_bias:
            layout[f"{ours}.attention.qkv.bias"] = tuple(
                Piece(f"{attention}.{name}_proj.bias", (rows[name],)) for name in "qkv"
            )
        if config.output_bias:
            layout[f"{ours}.attention.output.bias"] = (Piece(f"{attention}.o_proj.bias", (hidden,)),)
        if config.mlp_bias:
            layout[f"{ours}.mlp.up.bias"] = tuple(
                Piece(f"{mlp}.{name}_proj.bias", (wide,)) for name in ("gate", "up")
            )
            layout[f"{ours}.mlp.down.bias"] = (Piece(f"{mlp}.down_proj.bias", (hidden,)),)
        if config.qk_norm:
            layout[f"{ours}.attention.qk_norm_weight"] = tuple(
                Piece(f"{attention}.{name}_norm.weight", (dim,)) for name in "qk"
            )
    return layout


def _gpt2_layout(config: ModelConfig) -> Layout:
    hidden, wide = config.hidden_size, config.intermediate_size
    layout: Layout = {
        "embedding.weight": (Piece("transformer.wte.weight", (config.vocab_size, hidden)),),
        "position_embedding.weight": (
            Piece("transformer.wpe.weight", (config.max_position_embeddings, hidden)),
        ),
        "final_norm.weight": (Piece("transformer.ln_f.weight", (hidden,)),),
        "final_norm.bias": (Piece("transformer.ln_f.bias", (hidden,)),),
    }
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        for our_norm, their_norm in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            for kind in ("weight", "bias"):
                layout[f"{ours}.{our_norm}.{kind}"] = (Piece(f"{theirs}.{their_norm}.{kind}", (hidden,)),)
        for our_linear, their_linear, rows, columns in (
            ("attention.qkv", "attn.c_attn", 3 * hidden, hidden),
            ("attention.output", "attn.c_proj", hidden, hidden),
            ("mlp.up", "mlp.c_fc", wide, hidden),
            ("mlp.down", "mlp.c_proj", hidden, wide),
        ):
            layout[f"{ours}.{our_linear}.weight"] = (
                Piece(f"{theirs}.{their_linear}.weight", (columns, rows), transposed=True),
            )
            layout[f"{ours}.{our_linear}.bias"] = (Piece(f"{theirs}.{their_linear}.bias", (rows,)),)
    return layout
