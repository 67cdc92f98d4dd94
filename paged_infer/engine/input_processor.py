"""InputProcessor: prompts in, checked requests out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as ReadOnlyList
from typing import Any

from paged_infer.config import EngineConfig
from paged_infer.control.admission import add_sequences, check_beams, check_num_characters, check_request, truncated
from paged_infer.control.blocks.manager import BlockManager
from paged_infer.control.guided.grammar import Matcher
from paged_infer.control.policies import check_priority
from paged_infer.control.reasoning import ReasoningMatcher, ReasoningParser
from paged_infer.control.request import Request
from paged_infer.engine.grammars import GrammarCache
from paged_infer.engine.prompts import Prompt, plain_prompt
from paged_infer.execution.memory_plan import MemoryPlan
from paged_infer.kernels.fused.noise import request_seed
from paged_infer.model.config import ModelConfig
from paged_infer.params import BeamSearchParams, SamplingParams
from paged_infer.text.tokenizer import Tokenizer
from paged_infer.values import as_token_ids

Params = SamplingParams | BeamSearchParams


class InputProcessor:
    """Checks and tokenizes the requests of one engine, and numbers their sequences. Does not queue them.

    Args:
        clock: gives the time at which a request arrives.
        is_sent: whether parameters are sent to other processes, which may lack a class of the caller's own.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        model: ModelConfig,
        memory: MemoryPlan,
        manager: BlockManager,
        clock: Callable[[], float] = time.perf_counter,
        *,
        is_sent: bool = False,
    ) -> None:
        self._clock, self._is_sent = clock, is_sent
        self.tokenizer, self.config, self.model, self.memory, self.manager = tokenizer, config, model, memory, manager
        self.grammars = GrammarCache(tokenizer, model.vocab_size, model.eos_token_ids)
        self.reasoning_parser = self._make_reasoning_parser(config.reasoning_parser)
        self._num_requests = 0
        self._num_sequences = 0

    def process(
        self, request_id: str, prompt: Prompt, params: Params, cache_salt: str | None, priority: int = 0
    ) -> Request:
        """See ``LLMEngine.prepare``, errors included."""
        if not isinstance(request_id, str):
            raise ValueError(f"request_id={request_id!r}: must be a str")
        if self._is_sent and type(params) not in (SamplingParams, BeamSearchParams):
            raise ValueError(
                f"params={params!r}: must be SamplingParams or BeamSearchParams, and of no class derived from them, "
                "because they are sent to another process"
            )
        if self._is_sent and isinstance(params, SamplingParams) and params.logits_processors:
            raise ValueError(
                f"logits_processors={params.logits_processors!r:.80}: functions are not sent to another process; the "
                "model must be in this one (tensor_parallel_size=1, and no engine_process)"
            )
        beam_params = None
        if isinstance(params, BeamSearchParams):
            beam_params, params = params, params.limits
        prompt = plain_prompt(prompt)
        text = prompt if isinstance(prompt, str) else None
        token_ids = self._encode(prompt, params) if isinstance(prompt, str) else as_token_ids(prompt)
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop={params.stop!r} needs text, but this checkpoint has no tokenizer")
        if beam_params is not None:
            check_beams(
                beam_params,
                len(beam_params.stop_token_ids) + (0 if params.ignore_eos else len(self.model.eos_token_ids)),
                vocab_size=self.model.vocab_size,
                max_num_seqs=self.config.max_num_seqs,
            )
        token_ids = truncated(token_ids, params, self.memory.max_model_len)
        check_request(
            token_ids,
            params,
            vocab_size=self.model.vocab_size,
            max_model_len=self.memory.max_model_len,
            max_num_seqs=self.config.max_num_seqs,
            manager=self.manager,
            eos_token_ids=self.model.eos_token_ids,
        )
        if cache_salt is not None and not isinstance(cache_salt, str):
            raise ValueError(f"cache_salt={cache_salt!r}: must be a str or None")
        priority = check_priority(priority, self.config.scheduling_policy)
        self._check_budget(params)
        self._check_drafts(params)
        seed = request_seed(self.config.seed, self._num_requests) if params.seed is None else params.seed
        request = Request(request_id, text, token_ids, params, self._clock(), cache_salt, beam_params, priority)
        max_model_len, eos_token_ids = self.memory.max_model_len, self.model.eos_token_ids
        add_sequences(request, self._num_sequences, seed, max_model_len, eos_token_ids, self._new_matcher(request))
        self._num_requests += 1
        self._num_sequences += params.n
        return request

    def attach_matchers(self, request: Request) -> None:
        """Give each sequence of a request from another process a matcher at the beginning of its grammar."""
        if request.sequences[0].matcher is None:
            new_matcher = self._new_matcher(request)
            for sequence in request.sequences:
                sequence.matcher = new_matcher()

    def _new_matcher(self, request: Request) -> Callable[[], Matcher | None]:
        """A function that makes each sequence's matcher. Beams have none: they are not sampled."""
        asked, parser = request.params.structured_outputs, self.reasoning_parser
        grammar = None if asked is None else self.grammars.get(asked)
        if parser is None or request.beam_params is not None:
            return (lambda: None) if grammar is None else grammar.matcher
        first, budget = parser.first_part(request.prompt_token_ids), request.params.thinking_token_budget
        inner = None if grammar is None else grammar.matcher
        return lambda: ReasoningMatcher(parser, first, inner, budget)

    def _make_reasoning_parser(self, name: str | None) -> ReasoningParser | None:
        if name is None:
            return None
        if self.tokenizer is None:
            raise ValueError(f"reasoning_parser={name!r} needs text, but this checkpoint has no tokenizer")
        return ReasoningParser(name, self.grammars.vocabulary, self.tokenizer.special_tokens)

    def reasoning_start(self, prompt_token_ids: ReadOnlyList[int]) -> str | None:
        """Where the answer to a prompt begins, see ``text.reasoning_parsers``; None without ``reasoning_parser``."""
        return None if self.reasoning_parser is None else self.reasoning_parser.first_part(prompt_token_ids).value

    def _check_budget(self, params: SamplingParams) -> None:
        budget = params.thinking_token_budget
        if budget is None:
            return
        if self.reasoning_parser is None:
            raise ValueError(f"thinking_token_budget={budget}: needs the engine's option reasoning_parser")
        ends = {*params.stop_token_ids, *self.model.eos_token_ids}
        if params.min_tokens and not ends.isdisjoint(self.reasoning_parser.rest_of_end(0)):
            raise ValueError(
                f"thinking_token_budget={budget} with min_tokens={params.min_tokens}: stop_token_ids has a token of "
                f"{self.reasoning_parser.end.decode()}, which then could not be forced"
            )

    def _check_drafts(self, params: SamplingParams) -> None:
        given = [name for name in ("structured_outputs", "thinking_token_budget") if getattr(params, name) is not None]
        speculation, size = self.config.speculation, self.config.tensor_parallel_size
        if given and size > 1 and speculation is not None and speculation.method == "draft_model":
            raise ValueError(
                f"{given[0]} with a draft model and tensor_parallel_size={size}: not supported, because the "
                "masks after each draft would have to be sent between its steps"
            )

    def _encode(self, text: str, params: SamplingParams) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer: pass token ids, not text")
        if params.truncate_prompt_tokens is None:
            self.check_length(len(text))
        return self.tokenizer.encode(text)

    def check_length(self, num_characters: int) -> None:
        """Raises ContextLengthError for a text that is too long to fit, see ``check_num_characters``."""
        if self.tokenizer is not None and num_characters >= self.memory.max_model_len:
            most = self.tokenizer.max_token_characters
            check_num_characters(num_characters, most, self.memory.max_model_len)

    def check_chat_length(self, messages: ReadOnlyList[Mapping[str, Any]]) -> None:
        """``check_length`` of the user messages, stripped: every template renders those whole, others it may cut."""
        contents = (one.get("content") for one in messages if isinstance(one, Mapping) and one.get("role") == "user")
        self.check_length(sum(len(content.strip()) for content in contents if isinstance(content, str)))

    def warm_up(self) -> None:
        """Do now what must not happen in two threads at once, or takes too long for an event loop."""
        if self.tokenizer is not None:
            self.tokenizer.encode("warm up")  # the first call sets up truncation
            _ = self.tokenizer.max_token_characters  # it is computed once

    def chat_prompt(
        self,
        messages: ReadOnlyList[Mapping[str, Any]],
        tools: ReadOnlyList[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, ready for the answer."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer, so it cannot chat: pass token ids to generate()")
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, chat_template_kwargs=chat_template_kwargs or {}
        )
