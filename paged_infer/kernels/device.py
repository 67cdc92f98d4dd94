"""Where an engine computes, and in which type: what "auto" stands for."""

from __future__ import annotations

from pathlib import Path

import torch

from paged_infer.model.loading.load import saved_dtype


def device_of(name: str) -> torch.device:
    """Raises ValueError for one that cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def dtype_of(name: str, folder: Path, device: torch.device) -> torch.dtype:
    """``name``, or for "auto" float32 on a CPU and the checkpoint's own type elsewhere."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else saved_dtype(folder)
    return getattr(torch, name)
