"""lm-eval's tasks over ``LLM``: importing this registers the model ``paged-infer`` (extra ``[eval]``).

import lm_eval
import paged_infer.evaluation.lm_harness
lm_eval.simple_evaluate(model="paged-infer", model_args={"model": "storyteller"}, tasks=[...])
"""

from __future__ import annotations

from typing import Any

import lm_eval.models  # noqa: F401  # lm-eval registers its own models only while none is registered
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from paged_infer.evaluation.models import InProcess
from paged_infer.llm import LLM
from paged_infer.params import SamplingParams

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
MAX_GEN_TOKENS = 256  # lm-eval's own default


@register_model("paged-infer")
class PagedInferLM(TemplateLM):
    """An ``LLM`` with lm-eval's interface.

    Texts are encoded with what the tokenizer adds, such as a BOS, and read after ``InProcess.prefix_token_ids``. To do
    the same over HTTP, lm-eval's ``local-completions`` needs ``add_bos_token=True`` if there is a BOS.

    Args:
        model: see ``LLM``.
        llm: an ``LLM`` that is open already, instead of a model and options.
        batch_size, max_batch_size: lm-eval passes them. The engine makes its own batches, so only None, 1 and "auto"
            are accepted.
        options: those of ``LLM``.
    """

    def __init__(
        self,
        model: str | None = None,
        llm: LLM | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if batch_size not in (None, 1, "1", "auto") or max_batch_size is not None:
            raise ValueError(f"batch_size={batch_size!r}: the engine makes its own batches; see max_num_seqs")
        if llm is not None and (model is not None or options):
            raise ValueError("llm: it is open already, so there can be neither model nor options")
        self.evaluated = InProcess(llm or LLM(model, **options))

    @property
    def eot_token_id(self) -> int:
        return self.evaluated.prefix_token_ids[-1]

    @property
    def tokenizer_name(self) -> str:
        return self.evaluated.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        encode, prefix = self.evaluated.tokenizer.encode, self.evaluated.tokenizer.encode("")
        ids = encode(string)
        if add_special_tokens is False or (prefix and ids[len(prefix) :][: len(prefix)] == prefix):  # text has its BOS
            return ids[len(prefix) :]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        ids = self.evaluated.tokenizer.apply_chat_template(chat_history, add_generation_prompt)
        return self.evaluated.tokenizer.decode(ids, skip_special_tokens=False)

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        longest = self.evaluated.max_model_len - 1
        pairs = [([*prompt, *target][-longest:][: -len(target)], target) for _, prompt, target in requests]
        return [
            (sum(one.logprob for one in scores), all(one.is_best for one in scores))
            for scores in self.evaluated.continuations(pairs)
        ]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        texts = self.evaluated.rolling([request.args[0] for request in requests])
        return [sum(one.logprob for one in scores) for scores in texts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        prompts, params = [], []
        for request in requests:
            text, given = request.args
            params.append(_sampling(dict(given)))
            limit = self.evaluated.max_model_len - (params[-1].max_tokens or 0)
            if limit < 1:
                raise ValueError(f"max_gen_toks={params[-1].max_tokens}: leaves no room for a prompt")
            prompts.append(self.tok_encode(text)[-limit:])
        return [output.outputs[0].text for output in self.evaluated.run(prompts, params)]


def _sampling(given: dict[str, Any]) -> SamplingParams:
    """The parameters for lm-eval's generation arguments. Raises ValueError for one that is not supported."""
    stop, max_tokens = given.pop("until", None) or (), given.pop("max_gen_toks", MAX_GEN_TOKENS)
    samples = given.pop("do_sample", given.get("temperature", 0) > 0)
    options = {name: given.pop(name) for name in _SAMPLING if name in given}
    if given:
        raise ValueError(
            f"generation_kwargs {', '.join(given)}: not served; known: until, max_gen_toks, do_sample, "
            f"{', '.join(_SAMPLING)}"
        )
    options["temperature"] = options.get("temperature", 1.0) if samples else 0.0
    return SamplingParams(stop=stop, max_tokens=max_tokens, **options)
