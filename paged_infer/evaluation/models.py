"""What is evaluated: an ``LLM`` in this process, or a server over HTTP. Both continue texts and score them.

Prompt and continuation are encoded together, then cut at the length of the tokens of the prompt alone, as lm-eval does.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from collections.abc import Sequence as ReadOnlyList
from itertools import chain
from typing import Any, NamedTuple

from paged_infer.llm import LLM
from paged_infer.outputs import RequestOutput, prompt_token_logprobs
from paged_infer.params import SamplingParams
from paged_infer.text.tokenizer import Tokenizer

TokenIds = ReadOnlyList[int]
BATCH = 32  # prompts in a request over HTTP
TIMEOUT_S = 600.0  # without a byte of an answer


class TokenScore(NamedTuple):
    """One token's log-probability in nats, given those before it, and whether no other is more probable."""

    logprob: float
    is_best: bool


class EvaluatedModel(ABC):
    """Base class of both.

    Args:
        name: the name in tables.
        tokenizer: None is refused.
        max_model_len: the most tokens of a prompt and its continuation.
        eos_token_ids: those of the model's config.

    Attributes:
        prefix_token_ids: put before a text, so that its first token is predicted, too: what the tokenizer puts there
            (a BOS), or else the end-of-sequence token. Perplexities with different prefixes are not comparable.

    Raises:
        ValueError: no tokenizer, or neither of these two tokens.
    """

    def __init__(self, name: str, tokenizer: Tokenizer | None, max_model_len: int, eos_token_ids: TokenIds) -> None:
        if tokenizer is None:
            raise ValueError(f"{name}: has no tokenizer, so it cannot read tasks")
        self.name, self.tokenizer, self.max_model_len = name, tokenizer, max_model_len
        self._added = len(tokenizer.encode(""))
        self.prefix_token_ids = tokenizer.encode("") or list(eos_token_ids[:1])
        if not self.prefix_token_ids:
            raise ValueError(f"{name}: has neither a BOS nor an end-of-sequence token to put before a text")

    @abstractmethod
    def generate(self, prompts: ReadOnlyList[TokenIds], max_tokens: int, stop: ReadOnlyList[str]) -> list[str]:
        """The greedy continuation of each prompt, up to the first ``stop`` string, which is left out."""

    @abstractmethod
    def token_scores(self, texts: ReadOnlyList[TokenIds]) -> list[list[TokenScore]]:
        """The scores of all tokens but the first. A text has at most ``max_model_len`` - 1: one more is generated."""

    def cut(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both texts together, cut between them."""
        whole, first = self.tokenizer.encode(prompt + continuation), self.tokenizer.encode(prompt)
        return whole[: len(first)], whole[len(first) :]

    def with_prefix(self, text: str) -> list[int]:
        """Token ids of ``prefix_token_ids`` and the text."""
        return [*self.prefix_token_ids, *self.tokenizer.encode(text)[self._added :]]

    def continuations(self, pairs: ReadOnlyList[tuple[TokenIds, TokenIds]]) -> list[list[TokenScore]]:
        """The scores of each continuation's tokens, given its prompt. A prompt that is too long loses its beginning.

        Raises:
            ValueError: a continuation without a token before it, or longer than the model's context.
        """
        longest = self.max_model_len - 1
        for prompt, continuation in pairs:
            if not prompt or len(continuation) >= longest:
                raise ValueError(
                    f"{len(prompt)} and {len(continuation)} tokens: a continuation needs a token before it, and with it"
                    f" at most max_model_len - 1 = {longest}"
                )
        scores = self.token_scores([[*prompt, *continuation][-longest:] for prompt, continuation in pairs])
        return [one[len(one) - len(continuation) :] for one, (_, continuation) in zip(scores, pairs, strict=True)]

    def rolling(self, texts: ReadOnlyList[str]) -> list[list[TokenScore]]:
        """The scores of all tokens of each text, after ``prefix_token_ids``; a long text is cut by ``windows``."""
        start, size = len(self.prefix_token_ids), self.max_model_len - 1
        cut = [list(windows(self.with_prefix(text), start, size)) for text in texts]
        scores = iter(self.continuations(list(chain.from_iterable(cut))))
        return [[one for _ in parts for one in next(scores)] for parts in cut]


def windows(ids: TokenIds, start: int, size: int) -> Iterator[tuple[TokenIds, TokenIds]]:
    """(context, continuation) pairs of at most ``size`` tokens, such that each of ``ids[start:]`` is in one
    continuation: the first has as many tokens as fit, each later one the next tokens, with one token of context.

    The last window is moved back, so that its tokens have as much context as fits.

    >>> list(windows([0, 1, 2, 3, 4, 5, 6, 7], 1, 5))
    [([0], [1, 2, 3, 4]), ([3, 4], [5, 6, 7])]
    """
    end = start
    while end < len(ids):
        begin, end = end, min(len(ids), size if end == start else end + size - 1)
        yield ids[max(0, end - size) : begin], ids[begin:end]


class InProcess(EvaluatedModel):
    """An ``LLM``, whose ranks may be in other processes."""

    def __init__(self, llm: LLM, name: str | None = None) -> None:
        engine = llm.engine
        super().__init__(
            name or llm.name, llm.tokenizer, engine.memory.max_model_len, engine.model_config.eos_token_ids
        )
        self.llm = llm

    def generate(self, prompts: ReadOnlyList[TokenIds], max_tokens: int, stop: ReadOnlyList[str]) -> list[str]:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, stop=tuple(stop))
        return [output.outputs[0].text for output in self.run(prompts, params)]

    def token_scores(self, texts: ReadOnlyList[TokenIds]) -> list[list[TokenScore]]:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        return [
            [TokenScore(one.logprob, one.rank == 1) for one in prompt_token_logprobs(output)]
            for output in self.run(texts, params)
        ]

    def run(
        self, prompts: ReadOnlyList[TokenIds], params: SamplingParams | ReadOnlyList[SamplingParams]
    ) -> list[RequestOutput]:
        """``LLM.generate``; raises ValueError if one of the requests fails."""
        outputs = self.llm.generate([list(prompt) for prompt in prompts], params, use_tqdm=False)
        for index, output in enumerate(outputs):
            if output.outputs[0].error is not None:
                raise ValueError(f"{self.name}: prompt {index}: {output.outputs[0].error}")
        return outputs


class OverHttp(EvaluatedModel):
    """A server with OpenAI's completions that accepts token ids, ``echo`` and ``logprobs``, such as this package's and
    vLLM's.

    Args:
        base_url: such as ``http://127.0.0.1:8000``, with or without ``/v1``.
        tokenizer: the served model's.

    Raises:
        ValueError: no answer, an error, or an answer without what is needed.
    """

    def __init__(self, base_url: str, tokenizer: Tokenizer | None, name: str | None = None) -> None:
        self._url = base_url.rstrip("/").removesuffix("/v1") + "/v1"
        models = self._ask("models")
        try:
            served = models["data"][0]
            self._served, limit = served["id"], served.get("max_model_len")
        except (LookupError, TypeError, AttributeError):
            raise ValueError(f"{self._url}/models: names no model: {models!r:.200}") from None
        if not isinstance(limit, int):
            raise ValueError(f"{self._url}/models: lacks max_model_len")
        end = None if tokenizer is None else tokenizer.eos_token_id
        super().__init__(name or base_url, tokenizer, limit, [] if end is None else [end])

    def generate(self, prompts: ReadOnlyList[TokenIds], max_tokens: int, stop: ReadOnlyList[str]) -> list[str]:
        return [self._member(one, "text") for one in self._complete(prompts, max_tokens=max_tokens, stop=list(stop))]

    def token_scores(self, texts: ReadOnlyList[TokenIds]) -> list[list[TokenScore]]:
        found = []
        for text, choice in zip(texts, self._complete(texts, max_tokens=1, echo=True, logprobs=1), strict=True):
            logprobs = self._member(choice, "logprobs")
            own, top = (self._member(logprobs, name)[1:-1] for name in ("token_logprobs", "top_logprobs"))
            if not len(own) == len(top) == len(text) - 1 or None in own or None in top:
                raise ValueError(f"{self._url}/completions: an answer lacks log-probabilities of its prompt")
            rows = zip(own, top, strict=True)
            found.append([TokenScore(logprob, logprob >= max(others.values())) for logprob, others in rows])
        return found

    def _complete(self, prompts: ReadOnlyList[TokenIds], **body: Any) -> Iterator[dict[str, Any]]:
        for start in range(0, len(prompts), BATCH):
            some = [list(prompt) for prompt in prompts[start : start + BATCH]]
            answer = self._ask("completions", {"model": self._served, "prompt": some, "temperature": 0, **body})
            choices = sorted(self._member(answer, "choices"), key=lambda choice: self._member(choice, "index"))
            if len(choices) != len(some):
                raise ValueError(f"{self._url}/completions: {len(choices)} answers to {len(some)} prompts")
            yield from choices

    def _member(self, found: Any, name: str) -> Any:
        """Raises ValueError if there is none."""
        if not isinstance(found, dict) or found.get(name) is None:
            raise ValueError(f"{self._url}/completions: an answer has no {name}: {found!r:.200}")
        return found[name]

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}/{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise ValueError(f"{request.full_url}: {error.code}: {error.read().decode(errors='replace')}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:  # no server, or no JSON
            raise ValueError(f"{request.full_url}: {str(error) or type(error).__name__}") from None
