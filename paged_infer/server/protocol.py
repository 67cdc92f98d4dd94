"""What a request's body may hold: OpenAI's fields, and vLLM's beside them.

A field is either used, or known to change nothing here (``HARMLESS``), or refused by its name. ``null`` is the same as
a field left out, and the defaults are those of ``SamplingParams``.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from paged_infer.params import BeamSearchParams, SamplingParams
from paged_infer.server.errors import APIError
from paged_infer.server.messages import ChatMessage
from paged_infer.server.strict import ListOf, Strict

HARMLESS = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
"""Accepted and without effect: they are about accounts, and this server has none. ``store`` may only be false."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "priority": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Known and not supported, with the values that ask for nothing that is not there."""

MAX_STOPS, MAX_STOP_LENGTH, MAX_LOGPROBS = 16, 256, 20

_SAMPLING = (
    "n temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty seed min_tokens stop "
    "stop_token_ids ignore_eos truncate_prompt_tokens"
).split()
_OF_BEAMS = {"n", "min_tokens", "stop_token_ids", "ignore_eos"}  # of these, what a beam search knows


def _first_wrong(bias: Any) -> Any:
    """Of a dict with values that are no numbers, the first of these: the same for a dict, which cannot fail fast."""
    if not isinstance(bias, dict):
        return bias
    wrong = ((key, value) for key, value in bias.items() if type(value) not in (int, float))
    return dict([first]) if (first := next(wrong, None)) else bias


def within(minimum: float | None = None, maximum: float | None = None, **more: Any) -> Any:
    """A field that may be left out, with its limits as the OpenAPI document tells them.

    They are told there only: ``SamplingParams`` holds to them, so that the message names the value and the limit.
    """
    limits = {"minimum": minimum, "maximum": maximum, **more}
    return Field(None, json_schema_extra={name: limit for name, limit in limits.items() if limit is not None})


class StreamOptions(Strict):
    include_usage: bool | None = None


class SamplingFields(Strict):
    """How the tokens are chosen and when the answer ends; see ``paged_infer.SamplingParams``."""

    refused_by_name: ClassVar[Container[str]] = UNSUPPORTED

    n: int | None = within(1)
    temperature: float | None = within(0)
    top_p: float | None = within(exclusiveMinimum=0, maximum=1)
    top_k: int | None = within(-1)
    min_p: float | None = within(0, 1)
    repetition_penalty: float | None = within(exclusiveMinimum=0)
    presence_penalty: float | None = within(-2, 2)
    frequency_penalty: float | None = within(-2, 2)
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_first_wrong)] = None
    seed: int | None = within(-(2**63), 2**63 - 1)
    max_tokens: int | None = within(0)
    min_tokens: int | None = within(0)
    stop: str | ListOf[str] | None = within(minLength=1, maxLength=MAX_STOP_LENGTH, maxItems=MAX_STOPS)
    stop_token_ids: ListOf[int] | None = None
    ignore_eos: bool | None = None
    truncate_prompt_tokens: int | None = within(-1)
    cache_salt: str | None = Field(None, description="Cached blocks are shared with the same salt only.")
    use_beam_search: bool | None = Field(None, description="Search with `n` beams instead of sampling.")
    length_penalty: float | None = within(-10, 10)
    early_stopping: bool | Literal["never"] | None = None

    model: str | None = Field(None, description="One of `/v1/models`; may be left out.")
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if name not in UNSUPPORTED or name in cls.model_fields:
                kept[name] = value
            elif value is not None and not any(
                type(value) is type(v) and value == v for v in UNSUPPORTED[name]
            ):
                raise APIError(400, f"{name} is not supported", param=name, code="unsupported_field")
        if kept.get("store") is True:
            raise APIError(400, "store=true is not supported: nothing is kept", param="store")
        return kept

    def sampling_params(self, max_tokens: int | None, **others: Any) -> SamplingParams | BeamSearchParams:
        """Raises APIError 400 that names the field, its value and the limit."""
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        others = {name: value for name, value in others.items() if value is not None}
        self._check_stops()
        try:
            if self.use_beam_search:
                return self._beam_search_params(given, max_tokens, others)
            for name in ("length_penalty", "early_stopping"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)!r}: needs use_beam_search=true")
            return SamplingParams(**given, **others, max_tokens=max_tokens, logit_bias=self._logit_bias())
        except ValueError as error:
            raise bad_value(error) from None

    def _beam_search_params(
        self, given: dict[str, Any], max_tokens: int | None, others: dict[str, Any]
    ) -> BeamSearchParams:
        for name in [*given, *others, *(["logit_bias"] if self.logit_bias else [])]:
            if name not in _OF_BEAMS:
                raise ValueError(f"{name}={getattr(self, name, None)!r}: a beam search knows no {name}")
        if max_tokens is None:
            raise ValueError("max_tokens=None: a beam search needs a limit")
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
            raise APIError(400, f"stop: {found}: {limit}", param="stop")

    def _logit_bias(self) -> dict[int, float]:
        try:
            return {int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()}
        except ValueError:
            raise ValueError(f"logit_bias={self.logit_bias!r:.80}: its keys must be token ids") from None


class StreamedFields(SamplingFields):
    """Whether the answer comes in pieces."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise APIError(400, "stream_options: needs stream=true", param="stream_options")


class CompletionRequest(StreamedFields):
    prompt: str | ListOf[str] | ListOf[int] | ListOf[ListOf[int]]
    logprobs: int | None = within(0, MAX_LOGPROBS)
    echo: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or several, each a text or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise APIError(400, "prompt is an empty list: at least 1 prompt is needed", param="prompt")
        return [prompt] if isinstance(prompt[0], int) else list(prompt)

    def params(self) -> SamplingParams | BeamSearchParams:
        self.check_stream_options()
        check_logprobs("logprobs", self.logprobs)
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        if self.only_echoes:
            max_tokens = 1  # drawn, and left out of the answer
        return self.sampling_params(
            max_tokens, logprobs=self.logprobs, prompt_logprobs=self.logprobs if self.echo else None
        )

    @property
    def only_echoes(self) -> bool:
        """Whether just the prompt comes back: how its probability is asked for."""
        return bool(self.echo) and self.max_tokens == 0


class ChatCompletionRequest(StreamedFields):
    messages: ListOf[ChatMessage]
    max_completion_tokens: int | None = within(1)
    logprobs: bool | None = None
    top_logprobs: int | None = within(0, MAX_LOGPROBS)

    def params(self) -> SamplingParams | BeamSearchParams:
        self.check_stream_options()
        for name in ("max_tokens", "max_completion_tokens"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise APIError(400, f"{name}={limit}: must be an integer >= 1", param=name)
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(
                400, f"top_logprobs={self.top_logprobs}: needs logprobs=true", param="top_logprobs"
            )
        check_logprobs("top_logprobs", self.top_logprobs)
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            message = (
                f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} differ"
            )
            raise APIError(400, message, param="max_completion_tokens")
        return self.sampling_params(
            limits.pop() if limits else None, logprobs=(self.top_logprobs or 0) if self.logprobs else None
        )


class GenerateRequest(SamplingFields):
    prompt: str | ListOf[int]

    def params(self) -> SamplingParams | BeamSearchParams:
        return self.sampling_params(16 if self.max_tokens is None else self.max_tokens)


def check_logprobs(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise APIError(400, f"{name}={value}: must be an integer within [0, {MAX_LOGPROBS}]", param=name)


def bad_value(error: ValueError, prompt_field: str = "prompt", code: str | None = None) -> APIError:
    """The engine's own words, with the field that they begin with."""
    message = str(error)
    name = message.split("=", 1)[0].split("[", 1)[0].split(":", 1)[0]
    if message.startswith(
        (prompt_field, "the prompt", "prompt token", "character ", "this checkpoint has no")
    ):
        name = prompt_field
    return APIError(400, message, param=name if name.isidentifier() else None, code=code)
