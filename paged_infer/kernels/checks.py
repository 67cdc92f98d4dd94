"""Checks that the kernels share. They run before a launch, and raise one clear error (law 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from paged_infer.kernels.kv_quant import FORMATS

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INDICES = (torch.int64, torch.int32)


def shapes(**tensors: Tensor) -> str:
    """The name and the shape of each, for an error message."""
    return ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())


def layouts(**tensors: Tensor) -> str:
    """The name, dtype, device and strides of each, for an error message."""
    return ", ".join(f"{name} {x.dtype} on {x.device}, strides {x.stride()}" for name, x in tensors.items())


def on_one_device(**tensors: Tensor) -> bool:
    return len({x.device for x in tensors.values()}) == 1


def check_codes(
    k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
    names: tuple[str, str] = ("k_scale", "v_scale"),
) -> None:  # fmt: skip
    """Raises ValueError unless the caches [num_blocks, block_size, H_kv, D] are 8-bit codes and the scales fit them.

    ``names``: what the caller calls the scales, for the message.
    """
    if k_scale is None or v_scale is None:
        raise ValueError(f"{names[0]} and {names[1]} must be given together or not at all")
    tensors = {"k_cache": k_cache, "v_cache": v_cache, names[0]: k_scale, names[1]: v_scale}
    fits = k_scale.shape == v_scale.shape == k_cache.shape[:3] and k_scale.dtype == v_scale.dtype == torch.float16
    fits = fits and k_cache.dtype == v_cache.dtype and k_cache.dtype in FORMATS and on_one_device(**tensors)
    if not fits or not (k_scale.is_contiguous() and v_scale.is_contiguous()):
        raise ValueError(
            "scales must be float16 [num_blocks, block_size, H_kv], contiguous, with caches of int8, float8_e4m3fn or "
            f"float8_e5m2; got {shapes(**tensors)}; {layouts(**tensors)}"
        )


def check_slots(slot_mapping: Tensor, k_cache: Tensor) -> None:
    """Raises ValueError for a slot outside the cache. Only for CPU tensors: on a GPU the host would have to wait."""
    if slot_mapping.device.type == "cpu" and slot_mapping.numel() > 0:
        num_slots = k_cache.shape[0] * k_cache.shape[1]
        lowest, highest = (int(x) for x in slot_mapping.aminmax())
        if lowest < -1 or highest >= num_slots:
            raise ValueError(
                f"slots {lowest}..{highest} must be within -1..{num_slots - 1}, the last slot of the cache"
            )
