"""The quantised KV cache: for each token and head, its key or value vector as 8-bit codes and one float16 scale.

    k [D]  ->  scale = max |k| / largest code, rounded up to float16     codes [D] = k / scale, rounded to nearest
           <-  codes * scale

    k_cache [num_blocks, block_size, H_kv, D]     one byte each          k_scale [num_blocks, block_size, H_kv]

The codes of a vector depend on that vector only, so a token is stored with the same bits in any batch, chunk and block
size. The error of an element is at most scale / 2 in int8. In float8 it is at most 2^-4 (e4m3) or 2^-3 (e5m2) of the
element or, below the smallest normal code, scale * 2^-10 or scale * 2^-17.

An MLA latent [r + p] is two vectors with a scale each: the r normalised elements of the latent, and the p elements of
the rotated key, which are not normalised. vLLM's "fp8_ds_mla" keeps the rotated key in bfloat16 and has four scales for
r = 512: 656 bytes per token and layer of DeepSeek's models. Here both parts are quantised in every type, as the rotated
keys of all other models are: 580 bytes.

A zero vector has scale 0. A vector with NaN or infinity has scale NaN and is read as NaN. The largest scale is 65504,
so elements beyond 8.3e6 (int8), 2.9e7 (e4m3) or 3.7e9 (e5m2) saturate.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

LARGEST_CODE: Final = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
KV_DTYPES: Final = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}  # vLLM's names
FORMATS: Final = {torch.int8: 1, torch.float8_e4m3fn: 2, torch.float8_e5m2: 3}  # numbers for the kernels; 0: no codes
LARGEST_SCALE: Final = 65504.0  # of float16
SCALE_BYTES: Final = 2


def quantise_kv(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., D] -> codes [..., D] of ``dtype``, one of ``LARGEST_CODE``'s, and scales [...] float16."""
    x, largest = x.float(), LARGEST_CODE[dtype]
    top = x.abs().amax(-1)  # NaN where any element is
    scale = _round_up((top / largest).clamp(max=LARGEST_SCALE)).masked_fill(~top.isfinite(), torch.nan)
    codes = torch.where((scale > 0)[..., None], x * (1 / scale.float())[..., None], 0.0).clamp(-largest, largest)
    return (codes.round() if dtype is torch.int8 else codes).to(dtype), scale


def dequantise_kv(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes [..., D], scale [...] -> [..., D] of ``dtype``. The product is exact in float32."""
    return (codes.float() * scale.float()[..., None]).to(dtype)


def quantise_latents(x: Tensor, v_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., r + p], r = ``v_dim`` -> codes [..., r + p] as int8 bytes of ``dtype``, two scales [...] float16."""
    (latent, scale), (rest, rest_scale) = (quantise_kv(part, dtype) for part in (x[..., :v_dim], x[..., v_dim:]))
    return torch.cat((as_bytes(latent), as_bytes(rest)), -1), scale, rest_scale


def dequantise_latents(
    codes: Tensor, v_dim: int, scale: Tensor, rest_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """codes [..., r + p] of a dtype of ``LARGEST_CODE``, r = ``v_dim``, scales [...] -> [..., r + p] of ``dtype``."""
    latent, rest = codes[..., :v_dim], codes[..., v_dim:]
    return torch.cat((dequantise_kv(latent, scale, dtype), dequantise_kv(rest, rest_scale, dtype)), -1)


def as_bytes(cache: Tensor) -> Tensor:
    """A cache of codes viewed as int8, for kernels and copies that do not support float8; any other cache as it is."""
    return cache.view(torch.int8) if cache.dtype in FORMATS else cache


def _round_up(x: Tensor) -> Tensor:
    """The smallest float16 >= x, for x within 0 .. 65504, so that no element exceeds the largest code."""
    nearest = x.half()
    return (nearest.view(torch.int16) + (nearest.float() < x).short()).view(torch.float16)
