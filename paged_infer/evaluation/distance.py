"""How far one model's predictions are from another's: KL divergence, and how often both have the same top token."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList
from typing import NamedTuple

import torch
from torch import Tensor

from paged_infer.evaluation.models import InProcess
from paged_infer.evaluation.statistics import Estimate, ratio
from paged_infer.execution.executor import InProcessExecutor
from paged_infer.model.quant.calibration import divergence, log_probs
from paged_infer.params import SamplingParams


class Distance(NamedTuple):
    """Over all tokens of some texts.

    Attributes:
        kl: mean KL(reference || model) of the distribution after a token, in nats.
        agreement: share of tokens after which both have the same most probable token.
    """

    kl: Estimate
    agreement: Estimate


def distance(reference: InProcess, model: InProcess, texts: ReadOnlyList[str]) -> Distance:
    """The distance of ``model`` from ``reference`` after each token of each text, which begins with the prefix token.

    Raises:
        ValueError: their vocabularies differ, so there is nothing to compare; or a text is too long.
    """
    sizes = [one.llm.engine.model_config.vocab_size for one in (reference, model)]
    kls, same, tokens = list[float](), list[float](), list[float]()
    for text in texts:
        ids, others = reference.with_prefix(text), model.with_prefix(text)
        if ids != others or sizes[0] != sizes[1]:
            raise ValueError(f"{model.name}: has another vocabulary than {reference.name}, so KL is not defined")
        before, after = predictions(reference, ids), predictions(model, ids)
        kl, agrees = token_distances(before, after)
        kls.append(kl.sum().item())
        same.append(agrees.sum().item())
        tokens.append(len(ids))
    return Distance(ratio(kls, tokens), ratio(same, tokens))


def token_distances(reference: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of log-probabilities [T, V]: KL(reference || found) in nats [T], and whether both have the same
    largest one, bool [T]."""
    return divergence(reference, found), reference.argmax(-1) == found.argmax(-1)


def predictions(model: InProcess, ids: ReadOnlyList[int]) -> Tensor:
    """Log-probabilities of every token after each of ``ids``: [T, V].

    A decoder in this process computes them in one pass. Ranks in other processes only generate; ``prompt_logprobs``
    gives the same, but slowly, since each number becomes an object.

    Raises:
        ValueError: more tokens than fit in the model's context.
    """
    limit = model.max_model_len - 2
    if len(ids) > limit:
        raise ValueError(f"{model.name}: a text of {len(ids)} tokens, more than the {limit} that fit in its context")
    engine = model.llm.engine
    if isinstance(engine.executor, InProcessExecutor):
        return log_probs(engine.decoder, ids).cpu()
    vocab_size = engine.model_config.vocab_size
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=vocab_size)
    (output,) = model.llm.generate([[*ids, ids[0]]], params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    rows = (row for row in output.prompt_logprobs if row is not None)
    return torch.tensor([[row[token].logprob for token in range(vocab_size)] for row in rows])
