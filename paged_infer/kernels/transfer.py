"""From the host to the device without waiting for what the device is doing."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x``, which lies on the host, on ``device``.

    CUDA's copy from ordinary memory can make the host wait for the steps before. From pinned memory it is queued behind
    them, and torch keeps that memory from other use until the copy is made.
    """
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
