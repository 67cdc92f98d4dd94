"""The parameters of one request. Plain Python: nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from paged_infer.structured_outputs import StructuredOutputsParams as StructuredOutputsParams
from paged_infer.suggestions import suggests_names
from paged_infer.values import Checked, as_number, as_token_id, plain


@suggests_names("SamplingParams")
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(Checked):
    """How the tokens of one request are chosen, and when it ends. Names, defaults and meanings are vLLM's.

    A row of logits is processed in this order: ``logits_processors``, ``logit_bias``, ``min_tokens`` (end tokens are
    masked), the three penalties, ``structured_outputs`` (tokens that its grammar forbids are masked), ``temperature``,
    ``min_p``, ``top_k``, ``top_p``, then one sample. Logprobs are of the raw distribution, before any of these.

    Args:
        n: samples for the prompt, each with its own noise. More than one needs ``temperature > 0``.
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most probable tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of most probable tokens whose probabilities reach ``top_p``.
        min_p: keep tokens at least ``min_p`` times as probable as the most probable one.
        repetition_penalty: above 1 makes tokens of the prompt and of the output less likely
            (CTRL, Keskar et al. 2019, 4.1).
        presence_penalty: subtracted once from the logit of every token that the output holds.
        frequency_penalty: subtracted once for each time the output holds the token.
        logit_bias: token id -> what is added to its logit, within [-100, 100].
        seed: of the request; with None or -1, the engine derives one from its own and the request's number.
        max_tokens: the most tokens to generate; None means as many as ``max_model_len`` leaves.
        min_tokens: no end-of-sequence token, stop token or stop string is honoured before this many tokens.
        stop: strings that end the output; the text ends before the first of them. A str is one stop string.
            A stop string that is a special token ends the output when that token is sampled.
        stop_token_ids: tokens that end the output; like the end-of-sequence token, they are in
            ``token_ids``, not in ``text``.
        ignore_eos: do not stop at the end-of-sequence token.
        logprobs: for each output token, return the log-probabilities of this many top tokens and of the
            token itself.
        prompt_logprobs: the same for each prompt token except the first.
        truncate_prompt_tokens: keep only the last k tokens of the prompt; -1: as many as the context allows.
        structured_outputs: a grammar that the output follows. A sample ends with finish_reason "stop" when it is
            complete; if ``max_tokens`` comes first, with "length", in the middle of it. Not with ``min_tokens`` or
            ``ignore_eos``: the grammar decides where a sample ends. Reasoning comes before it and cannot end it.
        thinking_token_budget: the most tokens of reasoning; then ``</think>`` is forced, in as many tokens as it takes.
            Needs the engine's option ``reasoning_parser``. 0 ends it immediately; None and -1 set no limit.
        logits_processors: functions of your own, called in order before each token: ``(token_ids, logits)`` ->
            logits. ``token_ids`` is the list of the output so far, ``logits`` a float tensor [V] of this row only,
            which may be changed in place. They are also called for each draft, which may then be rejected. One that
            raises, or returns another shape, ends its request with an error. Only if the model is in the caller's
            process.

    ``stop``, ``stop_token_ids`` and ``logit_bias`` may be given as None; they are kept as tuples and a dict. Numbers
    may be numpy or torch scalars; they are kept as int and float.

    Raises:
        ValueError: a value is out of range or of the wrong type; the message names the value and the limit.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    thinking_token_budget: int | None = None
    logits_processors: Sequence[Callable[[list[int], Any], Any]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self._keep("stop", (self.stop,))
        self._check_integer("n", 1)
        self._check_number("temperature", 0.0, None)
        self._check_integer("top_k", -1)
        self._check_number("top_p", 0.0, 1.0, open_low=True)
        self._check_number("min_p", 0.0, 1.0)
        self._check_number("repetition_penalty", 0.0, None, open_low=True)
        self._check_number("presence_penalty", -2.0, 2.0)
        self._check_number("frequency_penalty", -2.0, 2.0)
        self._check_integer("seed", -(2**63), 2**63 - 1, optional=True)
        self._check_integer("thinking_token_budget", -1, optional=True)
        for name in ("seed", "thinking_token_budget"):
            if getattr(self, name) == -1:
                self._keep(name, None)
        self._check_integer("max_tokens", 1, optional=True)
        self._check_integer("min_tokens", 0, self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            self._check_integer(name, 0, optional=True)
        self._check_integer("truncate_prompt_tokens", -1, optional=True)
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens=0: must be an integer >= 1, or -1")
        if self.n > 1 and self.is_greedy:
            raise ValueError(f"n={self.n} with temperature=0: greedy samples are all the same; n must be 1")
        for string in self._check_tuple("stop"):
            if not isinstance(string, str) or not string:
                raise ValueError(f"stop={string!r}: a stop string must be a non-empty str")
        self._check_token_ids("stop_token_ids")
        self._check_flag("ignore_eos")
        self._check_logit_bias()
        if callable(self.logits_processors):
            self._keep("logits_processors", (self.logits_processors,))
        for processor in self._check_tuple("logits_processors"):
            if not callable(processor):
                raise ValueError(f"logits_processors={processor!r}: must be a function of token_ids and logits")
        if self.structured_outputs is not None:
            self._check_structured_outputs()

    def _check_structured_outputs(self) -> None:
        if not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise self._refuse("structured_outputs", "must be StructuredOutputsParams or None")
        for name in ("min_tokens", "ignore_eos"):
            if getattr(self, name):
                raise self._refuse(name, "not with structured_outputs, whose grammar decides where a sample ends")

    def _check_logit_bias(self) -> None:
        given: object = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(given, Mapping):
            raise ValueError(f"logit_bias={given!r}: must map token ids to numbers")
        kept = {}
        for key, value in given.items():
            token_id, bias = as_token_id("logit_bias", key), as_number(value)
            if bias is None or not -100 <= bias <= 100:
                raise ValueError(f"logit_bias[{token_id}]={value!r}: must be within [-100, 100]")
            kept[token_id] = bias
        self._keep("logit_bias", kept)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that have occurred are made less likely, or more."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def needs_history(self) -> bool:
        """Whether choosing a token needs the tokens before it."""
        return self.has_penalties or bool(self.logits_processors)


@suggests_names("BeamSearchParams")
@dataclass(frozen=True, slots=True)
class BeamSearchParams(Checked):
    """How to search for the most probable continuations. Names and meanings are transformers'.

    Args:
        beam_width: beams kept at every step, and answers returned (transformers' ``num_beams``); 1 is greedy.
        max_tokens: the most tokens to generate.
        length_penalty: an answer's score is its sum of logprobs over its length to this power, so values
            above 0 favour longer answers. Within [-10, 10], so that no power of a length overflows.
        early_stopping: once there are ``beam_width`` answers, True stops; False stops when the best beam, if it ended
            here, would not beat the worst of them; "never" stops when it could not even by reaching ``max_tokens``
            without losing probability (the same as False unless ``length_penalty > 0``).
        min_tokens: no end-of-sequence or stop token before this many tokens.
        stop_token_ids: tokens that end an answer as the end-of-sequence token does.
        ignore_eos: do not end at the end-of-sequence token.

    Raises:
        ValueError: a value is out of range or of the wrong type; the message names the value and the limit.
    """

    beam_width: int
    max_tokens: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._check_integer("beam_width", 1)
        self._check_integer("max_tokens", 1)
        self._check_number("length_penalty", -10.0, 10.0)
        early_stopping = plain(self.early_stopping)
        if not isinstance(early_stopping, bool) and not (isinstance(early_stopping, str) and early_stopping == "never"):
            raise ValueError(f"early_stopping={self.early_stopping!r}: must be True, False or 'never'")
        self._keep("early_stopping", early_stopping)
        limits = self.limits  # which checks the rest
        for name in ("min_tokens", "stop_token_ids", "ignore_eos"):
            self._keep(name, getattr(limits, name))

    @property
    def limits(self) -> SamplingParams:
        """The parameters that beams have in common with samples: their number, and where one ends."""
        return SamplingParams(
            n=self.beam_width,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
        )
