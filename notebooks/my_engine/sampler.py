# CHAPTER 01
"""How the next token is chosen: cut the distribution, then draw from it by the Gumbel-max trick."""

from dataclasses import dataclass

from paged_infer.kernels.fused.noise import noise, row_keys


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled and when a sequence ends: vLLM's names, but greedy by default."""

    max_tokens: int = 16
    temperature: float = 0.0  # 0: the most probable token
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    n: int = 1  # samples of each prompt
    ignore_eos: bool = False


def sample(logits, params, position, sample_index=0):
    """logits [V] -> the token id at ``position``."""
    if params.temperature == 0:
        return int(logits.argmax())
    logits, token_ids = logits.double().cpu().sort(descending=True, stable=True)  # both [V]
    probs = (logits / params.temperature).softmax(0)
    probs[probs < params.min_p * probs[0]] = 0
    if params.top_k > 0:
        probs[logits < logits[: params.top_k][-1]] = 0  # tokens as probable as the k-th stay
    if params.top_p < 1:
        before = probs.cumsum(0) - probs  # the sum of all that are more probable
        probs[before >= params.top_p * probs.sum()] = 0  # the token that crosses top_p stays
    # argmax(p / E), E exponential, is a draw from p. E is a function of these numbers alone.
    keys = row_keys([params.seed], [sample_index], [position])
    return int(token_ids[(probs / noise(keys, token_ids.int())[0]).argmax()])
