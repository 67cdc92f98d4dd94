"""What ``LLM`` and ``AsyncLLM`` have in common: what a caller may ask about the model."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList

from paged_infer.engine.input_processor import InputProcessor
from paged_infer.text.tokenizer import Tokenizer


class ModelInfo:
    """Read from what checks the requests, which is in this process wherever the model is."""

    def __init__(self, name: str, input_processor: InputProcessor) -> None:
        self._name, self._input_processor = name, input_processor

    @property
    def name(self) -> str:
        """The model's name: a bundled model's, the hub id that was given, or the name of its folder or file."""
        return self._name

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None if the checkpoint has none; then prompts must be token ids."""
        return self._input_processor.tokenizer

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer: ``encode``, ``decode``, ``apply_chat_template``. Raises ValueError if there is none."""
        if self.tokenizer is None:
            raise ValueError(f"model {self.name!r} has no tokenizer: prompts must be token ids")
        return self.tokenizer

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens, prompt and output together."""
        return self._input_processor.memory.max_model_len

    @property
    def cache_config(self) -> dict[str, str]:
        """How keys and values are stored, under the names of vLLM's metric."""
        plan = self._input_processor.memory
        return {
            "block_size": str(plan.block_size),
            "cache_dtype": plan.kv_cache_dtype,
            "num_gpu_blocks": str(plan.num_blocks),
        }

    @property
    def reasoning_parser(self) -> str | None:
        """The engine's option: how the model marks its reasoning."""
        return self._input_processor.config.reasoning_parser

    def reasoning_start(self, prompt_token_ids: ReadOnlyList[int]) -> str | None:
        """Where the answer to a prompt begins, see ``text.reasoning_parsers``; None without ``reasoning_parser``."""
        return self._input_processor.reasoning_start(prompt_token_ids)
