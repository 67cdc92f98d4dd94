"""The device that an engine computes on, and the copy of a tensor to it."""

from __future__ import annotations

import torch
from torch import Tensor


def device_of(name: str) -> torch.device:
    """The device named ``name``; "auto" is CUDA if there is a GPU, else the CPU.

    Raises:
        ValueError: the device cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device: torch.device | None = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):  # "mps", for example: nothing here runs on it
        meant = ": did you mean cuda?" if name == "gpu" else ":"
        raise ValueError(f"device={name!r}{meant} must be auto, cpu, cuda, or cuda:N for one of several GPUs")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"device={name!r} cannot be used: {reason}") from None
    return device


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy ``x`` from the host to ``device`` without waiting for the work that is queued there.

    A CUDA copy from pageable memory can block the host until earlier steps have finished. A copy from pinned memory is
    queued after them, and torch does not reuse that memory before the copy has completed.
    """
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
