"""Fields of OpenAI's and vLLM's requests that do nothing here: those that are accepted, and those that are refused.

A field that is not served would change the answer if it were, or it would not. In the first case it is refused by its
name, with the reason; a value that asks for what happens anyway is accepted. ``field_table`` writes all of it down.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ACCEPTED = {
    "metadata": "no requests are stored that it could be about",
    "prompt_cache_key": "the prefix cache finds equal beginnings by itself",
    "prompt_cache_options": "the prefix cache keeps what it has room for",
    "prompt_cache_retention": "the prefix cache keeps what it has room for",
    "safety_identifier": "there are no accounts",
    "service_tier": "`auto` or `default`: there is one tier",
    "session_id": "one engine serves all sessions",
    "store": "`false`: no answers are stored",
    "user": "there are no accounts",
}
"""Each with the reason why it changes nothing. They are fields of the models, which check their types."""


class Refused(NamedTuple):
    """Why a field is refused, and the values that ask for nothing beyond what is done anyway."""

    why: str
    harmless: tuple[Any, ...] = ()


_TOOLS = "no tools are called here"
_GRAMMAR = "answers are not held to a grammar"
_TEXT = "only text goes in and comes out"
_TEMPLATE = "the tokenizer's own chat template is used, with its defaults"
_RENDER = "there is no route that renders a prompt without an answer"
_TRANSFER = "one process has all of the cache"

REFUSED = {
    "add_generation_prompt": Refused(_TEMPLATE, (True,)),
    "add_special_tokens": Refused("a prompt is encoded with the tokenizer's special tokens", (True,)),
    "allowed_token_ids": Refused("tokens are restricted by logit_bias only", ([],)),
    "audio": Refused(_TEXT),
    "bad_words": Refused("tokens are forbidden by logit_bias only", ([],)),
    "chat_template": Refused(_TEMPLATE),
    "chat_template_kwargs": Refused(_TEMPLATE, ({},)),
    "continue_final_message": Refused(_TEMPLATE, (False,)),
    "detokenize": Refused("answers are text; return_token_ids adds the tokens", (True,)),
    "documents": Refused(_TEMPLATE, ([],)),
    "ec_transfer_params": Refused(_TRANSFER),
    "echo": Refused("the prompt is not repeated in the answer", (False,)),
    "function_call": Refused(_TOOLS, ("none",)),
    "functions": Refused(_TOOLS, ([],)),
    "guided_choice": Refused(_GRAMMAR),
    "guided_grammar": Refused(_GRAMMAR),
    "guided_json": Refused(_GRAMMAR),
    "guided_regex": Refused(_GRAMMAR),
    "include_reasoning": Refused("reasoning is not separated from the answer", (True,)),
    "include_stop_str_in_output": Refused("a stop string is never part of the answer", (False,)),
    "kv_transfer_params": Refused(_TRANSFER),
    "logits_processors": Refused("requests bring no code", ([],)),
    "logprob_token_ids": Refused("logprobs are of the most probable tokens"),
    "media_io_kwargs": Refused(_TEXT, ({},)),
    "mm_processor_kwargs": Refused(_TEXT, ({},)),
    "modalities": Refused(_TEXT, (["text"],)),
    "moderation": Refused("no moderation model runs here"),
    "parallel_tool_calls": Refused(_TOOLS, (True, False)),
    "prediction": Refused("drafts are the engine's: speculative_config"),
    "priority": Refused("requests are served in the order of their arrival", (0,)),
    "prompt_embeds": Refused("a prompt is text or token ids"),
    "reasoning_effort": Refused("the chat template is rendered without it", ("medium",)),
    "repetition_detection": Refused("repetitions do not end an answer"),
    "response_format": Refused(_GRAMMAR, ({"type": "text"},)),
    "return_mm_kwargs": Refused(_RENDER, (True, False)),
    "return_prompt_text": Refused("return_token_ids returns the tokens of the prompt", (False,)),
    "return_token_offsets": Refused(_RENDER, (False,)),
    "routed_experts_prompt_start": Refused("there are no experts", (0,)),
    "skip_special_tokens": Refused("special tokens are never part of the answer", (True,)),
    "spaces_between_special_tokens": Refused("special tokens are never part of the answer", (True,)),
    "stream_interval": Refused("a stream has a piece whenever an answer has grown", (1,)),
    "structured_outputs": Refused(_GRAMMAR),
    "suffix": Refused("a prompt is continued, not filled in", ("",)),
    "thinking_token_budget": Refused("reasoning is not separated from the answer", (-1,)),
    "tool_choice": Refused(_TOOLS, ("none",)),
    "tools": Refused(_TOOLS, ([],)),
    "truncation_side": Refused("truncate_prompt_tokens keeps the end of the prompt", ("left",)),
    "verbosity": Refused("it is not part of a prompt; ask for it in a message", ("medium",)),
    "vllm_xargs": Refused("there are no extensions that would read it", ({},)),
    "watermarking": Refused("texts carry no watermark", (False,)),
    "web_search_options": Refused(_TOOLS),
}
"""By name. A route that serves one of them nevertheless (``echo``) has it among its fields."""

REFUSED_IN_CHAT = {
    **REFUSED,
    "add_special_tokens": Refused("the chat template brings the special tokens", (False,)),
}


def is_harmless(value: Any, refused: Refused) -> bool:
    """Whether ``value`` asks for nothing. ``null`` is a field left out."""
    same = (value == v and isinstance(value, bool) == isinstance(v, bool) for v in refused.harmless)
    return value is None or any(same)
