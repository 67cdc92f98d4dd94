"""Errors for unknown names: what the caller may have meant, and what is known."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    # transformers
    "max_new_tokens": ("max_tokens",),
    "max_length": ("max_tokens", "max_model_len"),
    "min_new_tokens": ("min_tokens",),
    "num_return_sequences": ("n",),
    "num_beams": ("beam_width",),
    "do_sample": ("temperature",),
    "eos_token_id": ("stop_token_ids",),
    "stop_strings": ("stop",),
    "logits_processor": ("logits_processors",),
    "torch_dtype": ("dtype",),
    "device_map": ("device",),
    "attn_implementation": ("attention_backend",),
    # llama.cpp and Ollama
    "n_predict": ("max_tokens",),
    "num_predict": ("max_tokens",),
    "repeat_penalty": ("repetition_penalty",),
    "n_probs": ("logprobs",),
    "n_ctx": ("max_model_len",),
    "num_ctx": ("max_model_len",),
    "n_batch": ("max_num_batched_tokens",),
    "n_parallel": ("max_num_seqs",),
    # SGLang, TGI and nano-vLLM
    "context_length": ("max_model_len",),
    "mem_fraction_static": ("gpu_memory_utilization",),
    "max_running_requests": ("max_num_seqs",),
    "chunked_prefill_size": ("max_num_batched_tokens",),
    "tp_size": ("tensor_parallel_size",),
    "page_size": ("block_size",),
    "json_schema": ("structured_outputs",),
    "stop_sequences": ("stop",),
    "kvcache_block_size": ("block_size",),
    # OpenAI, and vLLM's own that have other names here
    "max_completion_tokens": ("max_tokens",),
    "max_output_tokens": ("max_tokens",),
    "response_format": ("structured_outputs",),
    "top_logprobs": ("logprobs",),
    "best_of": ("n",),
    "guided_json": ("structured_outputs",),
    "guided_decoding": ("structured_outputs",),
    "allowed_token_ids": ("logit_bias",),
    "num_gpu_blocks_override": ("num_blocks",),
    "enable_chunked_prefill": ("scheduling_policy",),
    "speculative_model": ("speculative_config",),
    "batch_size": ("max_num_seqs",),
    "max_batch_size": ("max_num_seqs",),
    "max_seq_len": ("max_model_len",),
}
"""A name in another library -> the parameters or engine options that have its meaning here."""

C = TypeVar("C", bound=type)


def suggestion(name: str, known: Collection[str]) -> str | None:
    """Which of ``known`` may be meant by ``name``: what another library calls by it, or what is spelt like it.

    >>> suggestion("max_new_tokens", ["max_tokens"]), suggestion("temp", ["temperature"]), suggestion("x", ["n"])
    ('max_tokens', 'temperature', None)
    """
    plain = name.lower().replace("-", "_")
    found = [one for one in OTHER_NAMES.get(plain, ()) if one in known]
    if len(plain) > 2 and plain.isidentifier():
        found += [one for one in known if one.startswith(plain)][:1] + get_close_matches(plain, known, 1)
    return found[0] if found else None


def unknown_names(what: str, unknown: Iterable[object], known: Collection[str], lists_known: bool = True) -> str:
    """The message of an error: each unknown name, what may be meant by it, and what is known.

    >>> unknown_names("unknown option", ["max_num_seq", "x"], ["max_num_seqs", "seed"])
    'unknown option max_num_seq (did you mean max_num_seqs?), x; known: max_num_seqs, seed'
    """
    parts = []
    for name in map(str, unknown):
        meant = suggestion(name, known)
        parts.append(name if meant is None else f"{name} (did you mean {meant}?)")
    return f"{what} {', '.join(parts)}" + (f"; known: {', '.join(known)}" if lists_known else "")


def suggests_names(cls: C) -> C:
    """Class decorator, above ``@dataclass``: an unknown keyword is a TypeError with ``unknown_names``."""
    init, known = cls.__init__, [one.name for one in fields(cls)]  # type: ignore[misc]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        if unknown := [name for name in given if name not in known]:
            raise TypeError(unknown_names(f"{cls.__name__}: unknown parameter", unknown, known))
        init(self, *args, **given)

    cls.__init__ = checked  # type: ignore[misc]
    return cls
