"""Request bodies: OpenAI's fields, and vLLM's in addition.

A field is served, accepted without effect, or refused by name (see ``fields``). ``null`` is the same as a missing
field, and the defaults are those of ``SamplingParams``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from paged_infer.params import BeamSearchParams, SamplingParams, StructuredOutputsParams
from paged_infer.server.openai.base_model import ListOf, StrictModel
from paged_infer.server.openai.errors import APIError
from paged_infer.server.openai.field_checks import MAX_LOGPROBS, bad_value, check_logprobs, first_wrong, within
from paged_infer.server.openai.fields import REFUSED, REFUSED_IN_CHAT, Refused, is_harmless
from paged_infer.server.openai.messages import ChatMessage
from paged_infer.server.openai.structured import GRAMMAR_FIELD, ResponseFormat, StructuredOutputs, renamed
from paged_infer.server.openai.tools import Tool, ToolChoice, checked_choice, in_terms_of_tools, tool_grammar

MAX_STOPS, MAX_STOP_LENGTH, MAX_ID_LENGTH = 16, 256, 256

_SAMPLING = (
    "n temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty seed min_tokens stop "
    "stop_token_ids ignore_eos truncate_prompt_tokens thinking_token_budget"
).split()
_BEAM_SEARCH = {"n", "min_tokens", "stop_token_ids", "ignore_eos"}  # those that a beam search supports


class StreamOptions(StrictModel):
    include_usage: bool | None = Field(None, description="A last chunk has the token counts.")
    continuous_usage_stats: bool | None = Field(
        None, description="With `include_usage`: each chunk has the token counts of its prompt so far."
    )
    include_obfuscation: bool | None = Field(
        None, description="Chunks are padded, so that their sizes on the network reveal less of the text."
    )


class SamplingFields(StrictModel):
    """How tokens are sampled and when the answer ends; see ``paged_infer.SamplingParams``."""

    refused_by_name: ClassVar[Mapping[str, Refused]] = REFUSED

    n: int | None = within(1)
    best_of: int | None = within(1, description="Must equal `n`: answers are not ranked.")
    temperature: float | None = within(0)
    top_p: float | None = within(exclusiveMinimum=0, maximum=1)
    top_k: int | None = within(-1)
    min_p: float | None = within(0, 1)
    repetition_penalty: float | None = within(exclusiveMinimum=0)
    presence_penalty: float | None = within(-2, 2)
    frequency_penalty: float | None = within(-2, 2)
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(first_wrong)] = None
    seed: int | None = within(-(2**63), 2**63 - 1, description="-1 means no seed.")
    max_tokens: int | None = within(0)
    min_tokens: int | None = within(0)
    stop: str | ListOf[str] | None = within(minLength=1, maxLength=MAX_STOP_LENGTH, maxItems=MAX_STOPS)
    stop_token_ids: ListOf[int] | None = None
    ignore_eos: bool | None = None
    truncate_prompt_tokens: int | None = within(-1)
    thinking_token_budget: int | None = within(
        -1, description="The most tokens of reasoning; needs `--reasoning-parser`. -1 means no limit."
    )
    cache_salt: str | None = Field(None, description="Cached blocks are shared with the same salt only.")
    priority: int | None = Field(None, description="Lower is more urgent; with `--scheduling-policy priority`.")
    use_beam_search: bool | None = Field(None, description="Search with `n` beams instead of sampling.")
    length_penalty: float | None = within(-10, 10)
    early_stopping: bool | Literal["never"] | None = None
    structured_outputs: StructuredOutputs | None = Field(
        None, description="One of `json` (a schema), `regex`, `choice` and `grammar` (EBNF)."
    )
    response_format: ResponseFormat | None = Field(None, description="`text`, `json_object` or `json_schema`.")

    model: str | None = Field(None, description="One of `/v1/models`; may be left out.")
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    session_id: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            refused = None if name in cls.model_fields else cls.refused_by_name.get(name)
            if refused is None:
                kept[name] = value
            elif not is_harmless(value, refused):
                message = f"{name} is not supported: {refused.why}"
                raise APIError(400, message, param=name, code="unsupported_field")
        if kept.get("store") is True:
            raise APIError(400, "store=true is not supported: answers are not stored", param="store")
        return kept

    def sampling_params(self, max_tokens: int | None, **others: Any) -> SamplingParams | BeamSearchParams:
        """Raises APIError 400 that names the field, its value and the limit."""
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        others = {name: value for name, value in others.items() if value is not None}
        self._check_stops()
        if self.best_of is not None and self.best_of != (1 if self.n is None else self.n):
            message = f"best_of={self.best_of}: must equal n={self.n or 1}: answers are not ranked"
            raise APIError(400, message, param="best_of")
        try:
            if (grammar := self._grammar()) is not None:
                others["structured_outputs"] = grammar
            if self.use_beam_search:
                return self._beam_search_params(given, max_tokens, others)
            for name in ("length_penalty", "early_stopping"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)!r}: needs use_beam_search=true")
            return SamplingParams(**given, **others, max_tokens=max_tokens, logit_bias=self._logit_bias())
        except ValueError as error:
            raise self.in_own_terms(bad_value(error)) from None

    @property
    def grammar_field(self) -> str:
        """The name of the field that gives the answer's grammar, if it has one."""
        has_format = self.response_format is not None and self.response_format.type != "text"
        return "response_format" if has_format else GRAMMAR_FIELD

    def _grammar(self) -> StructuredOutputsParams | None:
        given = None if self.structured_outputs is None else self.structured_outputs.params()
        found = None if self.response_format is None else self.response_format.params()
        if given is not None and found is not None:
            message = "response_format: not supported with structured_outputs"
            raise APIError(400, message, param="response_format")
        return given or found

    def in_own_terms(self, error: APIError) -> APIError:
        """The error; if it is about a grammar, it names the field of the request that gave the grammar."""
        if error.param != GRAMMAR_FIELD or self.grammar_field == GRAMMAR_FIELD:
            return error
        return bad_value(ValueError(in_terms_of_tools(renamed(error.message, self.grammar_field))))

    def _beam_search_params(
        self, given: dict[str, Any], max_tokens: int | None, others: dict[str, Any]
    ) -> BeamSearchParams:
        for name in [*given, *others, *(["logit_bias"] if self.logit_bias else [])]:
            if name == GRAMMAR_FIELD:
                raise ValueError(f"{self.grammar_field}: not supported with use_beam_search=true")
            if name not in _BEAM_SEARCH:
                raise ValueError(f"{name}={getattr(self, name, None)!r}: not supported with use_beam_search=true")
        if max_tokens is None:
            raise ValueError("max_tokens=None: must be set with use_beam_search=true")
        given["beam_width"] = given.pop("n", 1)
        for name in ("length_penalty", "early_stopping"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        return BeamSearchParams(**given, max_tokens=max_tokens)

    def _check_stops(self) -> None:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
            found = f"{len(stops)} strings, the longest of {max(map(len, stops))} characters"
            limit = f"at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters"
            raise APIError(400, f"stop: {found}: must be {limit}", param="stop")

    def _logit_bias(self) -> dict[int, float]:
        try:
            return {int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()}
        except ValueError:
            raise ValueError(f"logit_bias={self.logit_bias!r:.80}: its keys must be token ids") from None


class StreamedFields(SamplingFields):
    """How the answer is returned: whole or streamed, and with which fields besides the text."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    request_id: str | None = within(minLength=1, maxLength=MAX_ID_LENGTH, description="The answer's `id` ends with it.")
    prompt_logprobs: int | None = within(0, MAX_LOGPROBS, description="Without `stream`.")
    return_token_ids: bool | None = Field(None, description="Adds `token_ids` to each choice, and `prompt_token_ids`.")
    return_tokens_as_token_ids: bool | None = Field(
        None, description="In logprobs, tokens are named `token_id:5` instead of by their text."
    )

    def check_form(self) -> None:
        """Raises APIError 400 for fields that are out of range or contradict ``stream``."""
        if self.stream_options is not None and not self.stream:
            raise APIError(400, "stream_options: needs stream=true", param="stream_options")
        if self.request_id is not None and not 1 <= len(self.request_id) <= MAX_ID_LENGTH:
            message = f"request_id: must have 1 to {MAX_ID_LENGTH} characters, not {len(self.request_id)}"
            raise APIError(400, message, param="request_id")
        check_logprobs("prompt_logprobs", self.prompt_logprobs)
        if self.prompt_logprobs is not None and self.stream:
            message = f"prompt_logprobs={self.prompt_logprobs}: not supported with stream=true"
            raise APIError(400, message, param="prompt_logprobs")

    def wants(self, option: str) -> bool:
        """Whether ``option`` of ``stream_options`` is set."""
        return self.stream_options is not None and bool(getattr(self.stream_options, option))


class CompletionRequest(StreamedFields):
    prompt: str | ListOf[str] | ListOf[int] | ListOf[ListOf[int]]
    logprobs: int | None = within(0, MAX_LOGPROBS)
    echo: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or more prompts, each a text or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise APIError(400, "prompt=[]: must have at least 1 prompt", param="prompt")
        return [prompt] if isinstance(prompt[0], int) else list(prompt)

    def params(self) -> SamplingParams | BeamSearchParams:
        self.check_form()
        check_logprobs("logprobs", self.logprobs)
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        if self.only_echoes:
            max_tokens = 1  # sampled and discarded: the engine generates at least one
        prompt_logprobs = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            if prompt_logprobs not in (None, self.logprobs):
                message = f"prompt_logprobs={prompt_logprobs}: with echo, must equal logprobs={self.logprobs}"
                raise APIError(400, message, param="prompt_logprobs")
            prompt_logprobs = self.logprobs
        return self.sampling_params(max_tokens, logprobs=self.logprobs, prompt_logprobs=prompt_logprobs)

    @property
    def only_echoes(self) -> bool:
        """Whether the answer is only the prompt, as evaluation tools request it for the logprobs."""
        return bool(self.echo) and self.max_tokens == 0


class ChatCompletionRequest(StreamedFields):
    refused_by_name: ClassVar[Mapping[str, Refused]] = REFUSED_IN_CHAT

    messages: ListOf[ChatMessage]
    max_completion_tokens: int | None = within(1)
    logprobs: bool | None = None
    top_logprobs: int | None = within(0, MAX_LOGPROBS)
    tools: ListOf[Tool] | None = Field(None, description="Functions that the answer may call.")
    tool_choice: ToolChoice | None = Field(
        None, description="`auto` needs `--enable-auto-tool-choice`; `required` and a name do not."
    )
    parallel_tool_calls: bool | None = Field(None, description="`false`: at most one call.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template.")
    include_reasoning: bool | None = Field(None, description="`false` leaves `reasoning` out of the answer.")

    @cached_property
    def choice(self) -> ToolChoice:
        """``tool_choice`` with its default."""
        return checked_choice(self.tools or [], self.tool_choice)

    @property
    def is_parallel(self) -> bool:
        """``parallel_tool_calls`` with its default."""
        return self.parallel_tool_calls is not False

    @property
    def grammar_field(self) -> str:
        return super().grammar_field if self.choice in ("none", "auto") else "tools"

    def _grammar(self) -> StructuredOutputsParams | None:
        given, choice = super()._grammar(), self.choice
        if given is not None and choice != "none":
            field = super().grammar_field
            raise APIError(400, f'{field}: not supported with tools, unless tool_choice is "none"', param=field)
        return given or tool_grammar(self.tools or [], choice, self.is_parallel)

    def params(self) -> SamplingParams | BeamSearchParams:
        self.check_form()
        for name in ("max_tokens", "max_completion_tokens"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise APIError(400, f"{name}={limit}: must be an integer >= 1", param=name)
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(400, f"top_logprobs={self.top_logprobs}: needs logprobs=true", param="top_logprobs")
        check_logprobs("top_logprobs", self.top_logprobs)
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            message = f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} differ"
            raise APIError(400, message, param="max_completion_tokens")
        return self.sampling_params(
            limits.pop() if limits else None,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
        )


class GenerateRequest(SamplingFields):
    prompt: str | ListOf[int]

    def params(self) -> SamplingParams | BeamSearchParams:
        return self.sampling_params(16 if self.max_tokens is None else self.max_tokens)
