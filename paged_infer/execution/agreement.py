"""Check that ranks that work together were started with the same options, model and versions."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence as ReadOnlyList
from dataclasses import fields
from pathlib import Path

import torch

from paged_infer.config import EngineConfig
from paged_infer.control.policies import Policy

_MODEL_BYTES = 1 << 20  # of a GGUF file: its header


def fingerprint(folder: Path, config: EngineConfig) -> dict[str, str]:
    """What must be the same on every rank, by name. Of the device, only the type must be."""
    values = ((field.name, getattr(config, field.name)) for field in fields(config))
    options = {name: type(value).__qualname__ if isinstance(value, Policy) else repr(value) for name, value in values}
    options["device"] = torch.device(config.device).type if config.device != "auto" else "auto"
    path = folder / "config.json" if folder.is_dir() else folder
    with open(path, "rb") as file:
        model = hashlib.sha256(file.read(_MODEL_BYTES)).hexdigest()[:16]
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {**options, f"{path.name} (sha256)": model, **versions}


def check_agreement(fingerprints: ReadOnlyList[dict[str, str]]) -> None:
    """Raises ValueError, which names what differs, unless the fingerprints, one per rank, are equal."""
    first = fingerprints[0]
    for rank, other in enumerate(fingerprints):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            shown = ", ".join(f"{name}={other.get(name)} (rank 0: {first.get(name)})" for name in names)
            raise ValueError(f"rank {rank} was started with {shown}: all ranks need the same")
