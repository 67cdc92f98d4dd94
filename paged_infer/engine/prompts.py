"""Prompts as callers pass them: a str, token ids, or vLLM's dict with either; one prompt, or a list of them."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as ReadOnlyList
from typing import TypedDict, TypeVar, cast

from paged_infer.params import BeamSearchParams, SamplingParams
from paged_infer.suggestions import unknown_names
from paged_infer.values import TokenArray, as_integer, as_token_ids, as_tuple


class TextPrompt(TypedDict):
    """``{"prompt": "Once upon a time"}``"""

    prompt: str


class TokensPrompt(TypedDict):
    """``{"prompt_token_ids": [5, 6]}``"""

    prompt_token_ids: ReadOnlyList[int] | TokenArray


PlainPrompt = str | ReadOnlyList[int] | TokenArray
Prompt = PlainPrompt | TextPrompt | TokensPrompt
P = TypeVar("P", SamplingParams, BeamSearchParams)
_KEYS = ("prompt", "prompt_token_ids")


def plain_prompt(prompt: Prompt) -> PlainPrompt:
    """The text or the token ids of a prompt.

    Raises:
        ValueError: a dict without exactly one of ``prompt`` (a str) and ``prompt_token_ids``, or with another key.
    """
    if not isinstance(prompt, Mapping):
        return prompt
    if unknown := [key for key in prompt if key not in _KEYS]:
        raise ValueError(unknown_names("a prompt has the unknown key", unknown, _KEYS))
    given = [key for key in _KEYS if prompt.get(key) is not None]
    if len(given) != 1:
        raise ValueError(f"a prompt has either {' or '.join(_KEYS)}, not {' and '.join(given) or 'none'}")
    value = prompt[given[0]]  # type: ignore[literal-required]
    if (given[0] == "prompt") != isinstance(value, str):
        raise ValueError(
            f"{given[0]}={value!r:.80}: must be a {'str' if given[0] == 'prompt' else 'list of token ids'}"
        )
    return value


def list_prompts(prompts: Prompt | ReadOnlyList[Prompt]) -> list[Prompt]:
    """One prompt or several as a list. Raises ValueError if ``prompts`` is neither."""
    if hasattr(prompts, "tolist"):  # an array or tensor
        prompts = as_token_ids(prompts)  # type: ignore[arg-type]
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, ReadOnlyList) or isinstance(prompts, (bytes, bytearray)):
        found = type(prompts).__name__
        raise ValueError(f"prompts must be a str, a list of token ids, a dict, or a list of these, not {found}")
    is_single = len(prompts) > 0 and all(type(p) is int or as_integer(p) is not None for p in prompts)
    return [prompts] if is_single else list(prompts)  # type: ignore[list-item, arg-type]


def pair_prompts(
    prompts: Prompt | ReadOnlyList[Prompt], params: P | ReadOnlyList[P], kind: type[P]
) -> list[tuple[Prompt, P]]:
    """Each prompt with its parameters.

    Raises:
        ValueError: ``prompts`` is neither text nor a list, or the number of parameters is not that of the prompts.
    """
    each = list_prompts(prompts)
    if isinstance(params, kind):
        return [(prompt, params) for prompt in each]
    name = "sampling_params" if kind is SamplingParams else "beam_search_params"
    if not isinstance(params, ReadOnlyList) or not all(isinstance(one, kind) for one in params):
        other = "" if kind is BeamSearchParams else "; beam_search() takes BeamSearchParams"
        raise ValueError(f"{name}={params!r}: must be {kind.__name__}, or a list of them{other}")
    if len(params) != len(each):
        raise ValueError(f"{len(params)} {name} for {len(each)} prompts: pass one for all, or one for each")
    return list(zip(each, params, strict=True))


def list_priorities(priority: int | ReadOnlyList[int] | None, num_prompts: int) -> list[int]:
    """One priority for each prompt; None means 0. Raises ValueError if the numbers differ."""
    each = as_tuple(priority)  # None: it is one
    if each is None:
        return [0 if priority is None else cast(int, priority)] * num_prompts
    if len(each) != num_prompts:
        raise ValueError(f"{len(each)} priorities for {num_prompts} prompts: pass one for all, or one for each")
    return list(each)
