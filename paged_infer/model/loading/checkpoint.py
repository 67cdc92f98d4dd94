"""A checkpoint on disk, a folder in Hugging Face format or a GGUF file: config and tensors under the same names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from paged_infer.model.config import ModelConfig
from paged_infer.model.config_reader import read_json
from paged_infer.model.loading import gguf_model, safetensors
from paged_infer.model.loading.gguf_file import GgufTensor, is_gguf, read_gguf
from paged_infer.model.loading.safetensors import StoredTensor

MOST_PACKED = 32  # the most weights in one stored element: an int64 of 2-bit weights


def read_config(path: Path) -> ModelConfig:
    """The model's settings.

    Raises:
        ValueError: a file that cannot be read, or a setting that is not supported; the message names the file.
    """
    if not is_gguf(path):
        return ModelConfig.from_pretrained(path)
    raw = config_dict(path)
    try:
        return ModelConfig.from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def config_dict(path: Path) -> dict[str, Any]:
    """The content of config.json, or what it would be for a GGUF file."""
    if not is_gguf(path):
        return read_json(path / "config.json")
    file = read_gguf(path)
    try:
        return gguf_model.config_dict(file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def list_tensors(path: Path) -> list[StoredTensor]:
    """All tensors by the headers of the checkpoint's files; no weights are read.

    Raises:
        ValueError: a file that is missing, truncated or unreadable.
    """
    return [*gguf_model.list_tensors(read_gguf(path))] if is_gguf(path) else safetensors.list_tensors(path)


def check_size(config: ModelConfig, stored: list[StoredTensor], source: str) -> None:
    """Refuse a config of a far larger model before a layout is built, which has an entry for each expert and head row.

    Raises:
        ValueError: there are more layers than tensors, or more parameters than the tensors' elements can hold.
    """
    if config.num_layers > len(stored):
        raise ValueError(f"{source}: num_hidden_layers={config.num_layers}, but there are only {len(stored)} tensors")
    num_elements = sum(math.prod(tensor.shape) for tensor in stored)
    in_layers = replace(config, vocab_size=1, max_position_embeddings=1).num_parameters
    if in_layers > num_elements * MOST_PACKED:
        raise ValueError(
            f"{source}: the config's sizes amount to {in_layers} parameters without the embeddings, "
            f"but the tensors have only {num_elements} elements"
        )


def read_tensors(wanted: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Each of ``wanted`` under its key, as a checkpoint in Hugging Face format stores it, one at a time."""
    yield from ((key, stored.read()) for key, stored in wanted.items() if isinstance(stored, GgufTensor))
    others = {key: stored for key, stored in wanted.items() if not isinstance(stored, GgufTensor)}
    yield from safetensors.read_tensors(others)
