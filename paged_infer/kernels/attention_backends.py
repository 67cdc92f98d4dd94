"""Attention backends by name: the functions that compute attention over the paged cache. Users can register more.

A backend takes the queries and the cache of one layer, and the metadata of the step::

    @register_attention_backend("mine")
    def my_attention(q, k_cache, v_cache, step, *, window, scale=None, softcap=None, sinks=None):
        ...
    LLM(attention_backend="mine")

Only models that change their scores pass the last three (``ScoreOptions``), so a backend for others may leave them out.
Only a quantised cache (``kv_cache_dtype``) passes ``k_scale`` and ``v_scale`` (``AttentionOptions``). A backend with a
parameter ``layer`` is given the number of the layer that calls it.

``module:function`` names a backend that is not registered, for instance on the command line.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, Unpack

import torch
from torch import Tensor

from paged_infer.kernels.attention.checks import MAX_HEAD_DIM
from paged_infer.kernels.attention.metadata import AttentionMetadata, AttentionOptions
from paged_infer.kernels.attention.mla import (
    LatentBackend,
    dense_reference,
    dense_sdpa,
    dense_triton,
    latent_decode_reference,
    warn_once,
)
from paged_infer.kernels.attention.mla_decode import latent_decode
from paged_infer.kernels.attention.paged_attention import paged_attention, paged_attention_reference
from paged_infer.kernels.attention.paged_sdpa import latent_decode_batched, paged_attention_batched
from paged_infer.kernels.attention.tile_table import tables
from paged_infer.kernels.cpu.build import unavailable_reason
from paged_infer.kernels.cpu.paged_attention import latent_decode_c, paged_attention_c
from paged_infer.kernels.op_sets import C_OPS, SDPA_OPS, TORCH_OPS, TRITON_OPS, Ops
from paged_infer.kernels.triton_runtime import can_run_on

logger = logging.getLogger(__name__)


class AttentionBackend(Protocol):
    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionMetadata, *, window: int | None,
        **options: Unpack[AttentionOptions],
    ) -> Tensor:  # fmt: skip
        """q [T, H, D]; caches [num_blocks, block_size, H_kv, D] that already hold this step's tokens -> [T, H, D]."""
        ...


ATTENTION_BACKENDS: dict[str, AttentionBackend] = {"c": paged_attention_c, "sdpa": paged_attention_batched}


def register_attention_backend(name: str) -> Callable[[AttentionBackend], AttentionBackend]:
    """Decorator that registers a function as ``attention_backend=name``, replacing an earlier one of that name."""

    def register(function: AttentionBackend) -> AttentionBackend:
        ATTENTION_BACKENDS[name] = function
        return function

    return register


@register_attention_backend("torch")
def torch_backend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionMetadata, *, window: int | None,
    **options: Unpack[AttentionOptions],
) -> Tensor:  # fmt: skip
    """The reference: readable, one sequence at a time, on any device."""
    return paged_attention_reference(
        q, k_cache, v_cache, window=window,
        block_tables=step.block_tables, seq_lens=step.seq_lens, query_start_loc=step.query_start_loc, **options,
    )  # fmt: skip


@register_attention_backend("triton")
def triton_backend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, step: AttentionMetadata, *, window: int | None,
    **options: Unpack[AttentionOptions],
) -> Tensor:  # fmt: skip
    """The Triton kernels: compiled on CUDA; interpreted on a CPU, for tests and readers."""
    return paged_attention(
        q, k_cache, v_cache, window=window,
        block_tables=step.block_tables, seq_lens=step.seq_lens, query_start_loc=step.query_start_loc,
        num_decodes=step.num_decodes, max_query_len=step.max_query_len, max_seq_len=step.max_seq_len,
        shared=step.plan, **options,
    )  # fmt: skip


LATENT_BACKENDS: list[tuple[AttentionBackend, LatentBackend]] = [
    (torch_backend, LatentBackend(latent_decode_reference, dense_reference)),
    (paged_attention_batched, LatentBackend(latent_decode_batched, dense_sdpa)),
    (paged_attention_c, LatentBackend(latent_decode_c, dense_sdpa)),
    (triton_backend, LatentBackend(latent_decode, dense_triton)),
]


def latent_backend(backend: AttentionBackend) -> LatentBackend:
    """What ``backend`` computes MLA with: its entry of ``LATENT_BACKENDS``, or the reference, and a warning."""
    for known, latent in LATENT_BACKENDS:
        if known is backend:
            return latent
    name = getattr(backend, "__qualname__", type(backend).__qualname__)
    warn_once(f"attention_backend {name} has no entry in LATENT_BACKENDS: MLA is computed by the torch reference")
    return LATENT_BACKENDS[0][1]


def attention_backend(name: str, device: torch.device) -> tuple[AttentionBackend, Ops]:
    """The backend named ``name``, and the set of elementwise operations that goes with it.

    "auto" is the fastest on ``device``: "triton" on CUDA, "c" on a CPU with a C compiler, else "sdpa". "torch" and
    "sdpa" come with operations in plain torch, "triton" with Triton kernels, "c" with C functions, and any other
    backend with those that "auto" would choose. If the faster backend cannot run and "sdpa" is used instead, a warning
    gives the reason.

    Raises:
        ValueError: the name is unknown (the message lists the known ones), or the backend cannot run on ``device``.
    """
    if name == "auto":
        name = _fastest_or_warn(device)
    if name == "triton" and not can_run_on(device):
        raise ValueError(f"attention_backend='triton' cannot run on {device} here: {_NO_TRITON}")
    if name == "triton":
        tables()  # a malformed one is an error now, and not in the first step
    if name == "c" and (reason := unavailable_reason() if device.type == "cpu" else "it is for CPUs") is not None:
        raise ValueError(f"attention_backend='c' cannot run on {device} here: {reason}")
    backend = _imported(name) if ":" in name else ATTENTION_BACKENDS.get(name)
    if backend is None:
        known = ", ".join(("auto", *ATTENTION_BACKENDS, "module:function"))
        raise ValueError(f"attention_backend={name!r}: must be one of {known}")
    return backend, _OPS[name if name in _OPS else _fastest_or_warn(device)]


def suited_backend(backend: AttentionBackend, head_dim: int) -> AttentionBackend:
    """``backend``, or "sdpa" and a warning if the heads are larger than the Triton kernels take."""
    if backend is not triton_backend or head_dim <= MAX_HEAD_DIM:
        return backend
    warn_once(f"head_dim={head_dim}: the Triton kernels take up to {MAX_HEAD_DIM}, so 'sdpa' computes the attention")
    return paged_attention_batched


def names_layer(backend: AttentionBackend) -> bool:
    """Whether the backend has a parameter ``layer``."""
    try:
        return "layer" in inspect.signature(backend).parameters
    except (TypeError, ValueError):  # a function of an extension module may have none
        return False


def check_options(backend: Callable[..., Tensor], options: Iterable[str], needed_by: str = "this model") -> None:
    """Raises ValueError if ``backend``, or its decode of latents, does not take one of ``options``, keywords of it."""
    try:
        taken = inspect.signature(backend).parameters
    except (TypeError, ValueError):  # a function of an extension module may have none
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    if missing := [name for name in options if name not in taken]:
        named = f"{backend.__module__}:{getattr(backend, '__qualname__', type(backend).__qualname__)}"
        raise ValueError(
            f"attention_backend {named} takes no {' and no '.join(missing)}, which {needed_by} needs: add the keyword "
            "to the function, or choose another backend"
        )


class BackendChoice(NamedTuple):
    """The name of a backend; and why it is a slow one, if "auto" had to take it."""

    name: str
    slow_because: str | None = None


def backend_choice(name: str, device: torch.device, head_dim: int) -> BackendChoice:
    """What ``attention_backend`` and ``suited_backend`` choose for ``name``."""
    choice = _fastest(device) if name == "auto" else BackendChoice(name)
    if choice.name == "triton" and head_dim > MAX_HEAD_DIM:
        return BackendChoice("sdpa", f"head_dim={head_dim}: the Triton kernels take up to {MAX_HEAD_DIM}")
    return choice


def fastest_backend(device: torch.device) -> str:
    """The name of the backend that "auto" selects."""
    return _fastest(device).name


def _fastest(device: torch.device) -> BackendChoice:
    if device.type == "cuda":
        return BackendChoice("triton") if can_run_on(device) else BackendChoice("sdpa", _NO_TRITON)
    if device.type == "cpu":
        reason = unavailable_reason()
        return BackendChoice("c") if reason is None else BackendChoice("sdpa", reason)
    return BackendChoice("sdpa")


def _fastest_or_warn(device: torch.device) -> str:
    name, reason = _fastest(device)
    if reason is not None:
        logger.warning("%s uses plain torch (attention_backend='sdpa'), which is slower: %s", device, reason)
    return name


_NO_TRITON = "triton is not installed for it"
_OPS = {"torch": TORCH_OPS, "sdpa": SDPA_OPS, "c": C_OPS, "triton": TRITON_OPS}


def _imported(name: str) -> AttentionBackend:
    """The function ``module:function``. As for a script, the module may also be in the current folder."""
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"attention_backend={name!r} cannot be imported: {error}") from None
    if not callable(function):
        raise ValueError(f"attention_backend={name!r} is not a function but a {type(function).__name__}")
    return function
