"""Fields of OpenAI's and vLLM's requests that are not implemented: accepted without effect, or refused.

A field that would change the answer is refused by name, with the reason, unless its value asks for the behaviour that
the server has anyway. A field that would not change the answer is accepted. ``field_table`` lists them all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ACCEPTED = {
    "metadata": "requests are not stored",
    "prompt_cache_key": "the prefix cache matches equal prefixes automatically",
    "prompt_cache_options": "the prefix cache keeps as many blocks as fit",
    "prompt_cache_retention": "the prefix cache keeps as many blocks as fit",
    "safety_identifier": "there are no accounts",
    "service_tier": "`auto` or `default`: there is one tier",
    "session_id": "one engine serves all sessions",
    "store": "`false`: answers are not stored",
    "user": "there are no accounts",
}
"""Name -> why it has no effect. All are fields of the request models, which check their types."""


class Refused(NamedTuple):
    """Why a field is refused, and the values that are accepted because they match what the server does."""

    why: str
    harmless: tuple[Any, ...] = ()


FUNCTIONS = "tools and tool_choice have taken its place"
_GUIDED = "structured_outputs has taken its place"
_CHAT = "only chats have it"
TEXT = "input and output are text only"
_TEMPLATE = "the tokenizer's own chat template is used, with its defaults"
_RENDER = "there is no route that only renders a prompt"
_TRANSFER = "the cache is not split between processes"

REFUSED = {
    "add_generation_prompt": Refused(_TEMPLATE, (True,)),
    "add_special_tokens": Refused("a prompt is encoded with the tokenizer's special tokens", (True,)),
    "allowed_token_ids": Refused("use logit_bias to restrict tokens", ([],)),
    "audio": Refused(TEXT),
    "bad_words": Refused("use logit_bias to forbid tokens", ([],)),
    "chat_template": Refused(_TEMPLATE),
    "chat_template_kwargs": Refused(_CHAT, ({},)),
    "continue_final_message": Refused(_TEMPLATE, (False,)),
    "detokenize": Refused("answers are always text; return_token_ids adds the token ids", (True,)),
    "documents": Refused(_TEMPLATE, ([],)),
    "ec_transfer_params": Refused(_TRANSFER),
    "echo": Refused("the prompt is not repeated in the answer", (False,)),
    "function_call": Refused(FUNCTIONS, ("none",)),
    "functions": Refused(FUNCTIONS, ([],)),
    "guided_choice": Refused(_GUIDED),
    "guided_grammar": Refused(_GUIDED),
    "guided_json": Refused(_GUIDED),
    "guided_regex": Refused(_GUIDED),
    "include_reasoning": Refused(_CHAT, (True,)),
    "include_stop_str_in_output": Refused("a stop string is never part of the answer", (False,)),
    "kv_transfer_params": Refused(_TRANSFER),
    "logits_processors": Refused("requests cannot contain code", ([],)),
    "logprob_token_ids": Refused("logprobs are returned for the most probable tokens only"),
    "media_io_kwargs": Refused(TEXT, ({},)),
    "mm_processor_kwargs": Refused(TEXT, ({},)),
    "modalities": Refused(TEXT, (["text"],)),
    "moderation": Refused("there is no moderation model"),
    "parallel_tool_calls": Refused(_CHAT, (True, False)),
    "prediction": Refused("speculation is an option of the engine (speculative_config)"),
    "prompt_embeds": Refused("a prompt is text or token ids"),
    "reasoning_effort": Refused("the chat template is rendered without it", ("medium",)),
    "repetition_detection": Refused("repetition does not end an answer"),
    "return_mm_kwargs": Refused(_RENDER, (True, False)),
    "return_prompt_text": Refused("return_token_ids returns the prompt's tokens", (False,)),
    "return_token_offsets": Refused(_RENDER, (False,)),
    "routed_experts_prompt_start": Refused("the experts of a token are not returned", (0,)),
    "skip_special_tokens": Refused("special tokens are never part of the answer", (True,)),
    "spaces_between_special_tokens": Refused("special tokens are never part of the answer", (True,)),
    "stream_interval": Refused("a stream sends a chunk whenever an answer has grown", (1,)),
    "suffix": Refused("a prompt is continued; infilling is not supported", ("",)),
    "tool_choice": Refused(_CHAT, ("none",)),
    "tools": Refused(_CHAT, ([],)),
    "truncation_side": Refused("truncate_prompt_tokens keeps the end of the prompt", ("left",)),
    "verbosity": Refused("the chat template is rendered without it; ask for it in a message", ("medium",)),
    "vllm_xargs": Refused("there are no extensions to read it", ({},)),
    "watermarking": Refused("text is not watermarked", (False,)),
    "web_search_options": Refused("the server has no tools of its own"),
}
"""Name -> reason and harmless values. Where a route serves one of these (``echo``), its model has that field."""

REFUSED_IN_CHAT = {**REFUSED, "add_special_tokens": Refused("the chat template adds the special tokens", (False,))}


def is_harmless(value: Any, refused: Refused) -> bool:
    """Whether ``value`` matches what the server does anyway. ``null`` is the same as a missing field."""
    same = (value == v and isinstance(value, bool) == isinstance(v, bool) for v in refused.harmless)
    return value is None or any(same)
