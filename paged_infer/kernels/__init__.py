"""The kernels, each with a readable reference in plain torch, and what a custom attention backend needs.

The public names are imported when they are first used: ``import paged_infer.kernels`` alone imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paged_infer.kernels.attention.flash_attention import attention_weights as attention_weights
    from paged_infer.kernels.attention.flash_attention import flash_attention as flash_attention
    from paged_infer.kernels.attention.flash_attention import flash_attention_reference as flash_attention_reference
    from paged_infer.kernels.attention.metadata import AttentionMetadata as AttentionMetadata
    from paged_infer.kernels.attention.paged_attention import paged_attention as paged_attention
    from paged_infer.kernels.attention.paged_attention import paged_attention_reference as paged_attention_reference
    from paged_infer.kernels.attention.recorder import AttentionRecorder as AttentionRecorder
    from paged_infer.kernels.attention_backends import register_attention_backend as register_attention_backend
    from paged_infer.kernels.fused.copy_blocks import copy_blocks as copy_blocks
    from paged_infer.kernels.fused.copy_blocks import copy_blocks_reference as copy_blocks_reference
    from paged_infer.kernels.fused.qk_norm_rope import qk_norm_rope as qk_norm_rope
    from paged_infer.kernels.fused.qk_norm_rope import qk_norm_rope_reference as qk_norm_rope_reference
    from paged_infer.kernels.fused.rms_norm import add_rms_norm as add_rms_norm
    from paged_infer.kernels.fused.rms_norm import add_rms_norm_reference as add_rms_norm_reference
    from paged_infer.kernels.fused.sample import sample as sample
    from paged_infer.kernels.fused.sample import sample_reference as sample_reference
    from paged_infer.kernels.fused.silu_mul import silu_mul as silu_mul
    from paged_infer.kernels.fused.silu_mul import silu_mul_reference as silu_mul_reference
    from paged_infer.kernels.fused.store_kv import store_kv as store_kv
    from paged_infer.kernels.fused.store_kv import store_kv_reference as store_kv_reference

# The module of each kernel and of its reference. No submodule of this package may have one of these names: importing it
# would replace the function.
_KERNELS = {
    "flash_attention": "attention.flash_attention",
    "paged_attention": "attention.paged_attention",
    "add_rms_norm": "fused.rms_norm",
    "copy_blocks": "fused.copy_blocks",
    "qk_norm_rope": "fused.qk_norm_rope",
    "sample": "fused.sample",
    "silu_mul": "fused.silu_mul",
    "store_kv": "fused.store_kv",
}
_MODULES = {
    **_KERNELS,
    **{f"{name}_reference": module for name, module in _KERNELS.items()},
    "attention_weights": "attention.flash_attention",
    "AttentionMetadata": "attention.metadata",
    "AttentionRecorder": "attention.recorder",
    "register_attention_backend": "attention_backends",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
