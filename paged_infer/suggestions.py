"""Errors for unknown names: what the caller may have meant, and what is known."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeVar, cast

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

OTHER_VALUES: Mapping[str, str] = {
    "half": "float16",
    "fp16": "float16",
    "f16": "float16",
    "bf16": "bfloat16",
    "float": "float32",
    "fp32": "float32",
    "f32": "float32",
    "e4m3": "fp8",
    "fp8_e4m3": "fp8",
    "fp8_e4m3fn": "fp8",
    "float8_e4m3fn": "fp8",
    "e5m2": "fp8_e5m2",
    "float8_e5m2": "fp8_e5m2",
}
"""What torch, vLLM and llama.cpp call a value of an option, mostly a dtype -> what it is called here."""

PLACES: dict[str, Collection[str]] = {}
"""What takes parameters -> their names. Filled by ``suggests_names``, as the modules that use it are imported."""

MOST_PLACES = 3  # that an error names
C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])


class Meant(NamedTuple):
    """What an unknown name may stand for."""

    name: str
    places: tuple[str, ...] = ()  # where it is known; none: it is a known name where it was given


def suggestion(name: str, known: Collection[str], places: Mapping[str, Collection[str]] | None = None) -> Meant | None:
    """Which of ``known`` may be meant by ``name``, or else which name that is known in one of ``places``.

    >>> suggestion("max_new_tokens", ["max_tokens"]).name, suggestion("x", ["n"])
    ('max_tokens', None)
    >>> suggestion("temp", ["seed"], {"SamplingParams": ["temperature", "seed"]})
    Meant(name='temperature', places=('SamplingParams',))
    """
    plain = name.lower().replace("-", "_")
    others = OTHER_NAMES.get(plain, ())
    elsewhere = list(dict.fromkeys(one for names in (places or {}).values() for one in names))
    is_word = len(plain) > 2 and plain.isidentifier()
    found: list[str] = [one for one in others if one in known]
    if is_word:  # "params" for "sampling_params", and the other way round
        found += [one for one in known if one.endswith(f"_{plain}") or (len(one) > 2 and plain.endswith(f"_{one}"))]
    found += [plain] if plain in elsewhere else []
    found += [one for one in others if one in elsewhere]
    if is_word:
        found += [one for one in known if one.startswith(plain)][:1] + get_close_matches(plain, known, 1)
        found += [one for one in elsewhere if one.startswith(plain)][:1] + get_close_matches(plain, elsewhere, 1, 0.8)
    if not found:
        return None
    meant = found[0]
    where = () if meant in known else tuple(place for place, names in (places or {}).items() if meant in names)
    return Meant(meant, where[:MOST_PLACES])


def hint(
    name: str,
    known: Collection[str],
    places: Mapping[str, Collection[str]] | None = None,
    spell: Callable[[str], str] = str,
) -> str:
    """What an error adds to an unknown name: what may be meant, or where it belongs; "" if neither is known.

    ``spell``: how a name is written where it is given, such as "--max-tokens".

    >>> hint("max_num_seq", ["max_num_seqs"]), hint("n", ["seed"], {"SamplingParams": ["n"]})
    (' (did you mean max_num_seqs?)', ' (belongs to SamplingParams)')
    """
    meant = suggestion(name, known, places)
    if meant is None:
        return ""
    where = " or ".join(meant.places)
    if meant.name == name:
        return f" (belongs to {where})"
    return f" (did you mean {spell(meant.name)}" + (f" of {where}?)" if where else "?)")


def value_hint(value: object, known: Collection[str]) -> str:
    """What an error adds to a value that is none of ``known``: which may be meant; "" if that is not known.

    >>> value_hint("half", ["float32", "float16"]), value_hint("int8", ["float16"])
    (' (did you mean float16?)', '')
    """
    plain = str(value).lower().replace("-", "_").removeprefix("torch.")
    other = OTHER_VALUES.get(plain)
    found = [other] if other in known else get_close_matches(plain, known, 1, 0.8)
    return f" (did you mean {found[0]}?)" if found else ""


def unknown_names(
    what: str,
    unknown: Iterable[object],
    known: Collection[str],
    lists_known: bool = True,
    places: Mapping[str, Collection[str]] | None = None,
) -> str:
    """The message of an error: each unknown name with its ``hint``, and what is known. ``places``: None is ``PLACES``.

    >>> unknown_names("unknown option", ["max_num_seq", "x"], ["max_num_seqs", "seed"])
    'unknown option max_num_seq (did you mean max_num_seqs?), x; known: max_num_seqs, seed'
    """
    others = PLACES if places is None else places
    named = ", ".join(name + hint(name, known, others) for name in map(str, unknown))
    return f"{what} {named}" + (f"; known: {', '.join(known)}" if lists_known else "")


def suggests_names(place: str, *more: str) -> Callable[[C], C]:
    """Class decorator, above ``@dataclass``: an unknown keyword is a TypeError with ``unknown_names``.

    Args:
        place: what errors elsewhere say that these parameters belong to.
        more: names that belong there and are no fields.
    """

    def decorate(cls: C) -> C:
        init, names = cls.__init__, fields(cls)  # type: ignore[misc]
        known = [one.name for one in names]
        PLACES[place] = [*more, *known]

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **given: Any) -> None:
            if unknown := [name for name in given if name not in known]:
                raise TypeError(unknown_names(f"{cls.__name__}: unknown parameter", unknown, known))
            if args and names[0].kw_only:
                raise TypeError(
                    f"{cls.__name__}: parameters are given by name, as in {known[0]}=..., not {args[0]!r:.80}"
                )
            init(self, *args, **given)

        cls.__init__ = checked  # type: ignore[misc]
        return cls

    return decorate


def checks_keywords(function: F) -> F:
    """Decorator of a function with fixed parameters: an unknown keyword is a TypeError with ``unknown_names``."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: Any, **given: Any) -> Any:
        if unknown := [name for name in given if name not in known]:
            raise TypeError(unknown_names(f"{function.__qualname__}: unknown parameter", unknown, known))
        return function(*args, **given)

    return cast(F, checked)
