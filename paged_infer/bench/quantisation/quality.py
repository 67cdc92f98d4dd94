"""What quantisation loses: a decoder with quantised weights compared with the same one in float32, on held-out texts.

Weights are quantised and dequantised in place, so any scheme can be measured, with or without a kernel.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paged_infer.bench.quantisation.cases import Case
from paged_infer.bench.workloads import OPENINGS
from paged_infer.evaluation.distance import token_distances
from paged_infer.kernels.quant.product import int8_tokens
from paged_infer.kernels.quant.weight import QuantisedWeight
from paged_infer.llm import LLM
from paged_infer.model.decoder import Decoder
from paged_infer.model.linear import DENSE
from paged_infer.model.loading.load import load_decoder
from paged_infer.model.loading.targets import targets_of
from paged_infer.model.quant.calibration import Texts, log_probs
from paged_infer.model.quant.nf4 import BLOCK, dequantise_nf4, quantise_nf4
from paged_infer.model.quant.post_training import quantise_decoder
from paged_infer.model.quant.scheme import rounded
from paged_infer.params import SamplingParams
from paged_infer.quantize import calibration_texts
from paged_infer.storyteller.evaluation import document, quizzes
from paged_infer.storyteller.stories.grammar import FIRST_EVALUATION_SEED, tell

SCALE_BITS = 16  # of a scale, as most checkpoints store it; that of an NF4 block has 32
OWN_TOKENS = 128  # the model generates so many for a text of its own
Predict = Callable[[ReadOnlyList[int]], Tensor]  # token ids [T] -> log-probabilities of what follows each, [T, V]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A text and the spans of its answers; an answer counts as right if all of its tokens are."""

    token_ids: list[int]
    answers: tuple[slice, ...] = ()


@dataclass(frozen=True, slots=True)
class Quality:
    """The quality of one scheme and method.

    Attributes:
        bits: bits per weight, with scales and zero points.
        kl: mean KL(float || quantised) over all tokens, in nats.
        agreement: top-1 agreement: share of positions whose most likely next token is that of the float model.
        perplexity: exp of the mean negative log-likelihood of all tokens but the first of each text.
        recall: share of questions whose greedy answer is right; None if the texts have no questions.
    """

    scheme: str
    method: str
    bits: float
    kl: float
    agreement: float
    perplexity: float
    recall: float | None


def held_out_stories(llm: LLM, count: int, seed: int) -> list[HeldOut]:
    """Stories that neither training nor calibration uses, with the spans of their answers."""
    assert llm.tokenizer is not None
    found = []
    for index in range(count):
        story = tell(FIRST_EVALUATION_SEED + seed * count + index)
        spans = []
        for prompt, answer in quizzes(story):  # each prompt is a beginning of the document, cut between two words
            start = len(llm.tokenizer.encode(prompt))
            spans.append(slice(start, len(llm.tokenizer.encode(f"{prompt} {answer}\n"))))
        found.append(HeldOut(llm.tokenizer.encode(document(story)), tuple(spans)))
    return found


def own_texts(llm: LLM, count: int, seed: int) -> list[list[int]]:
    """Beginnings of sentences continued by the float model at temperature 1: texts like those that it is used for."""
    assert llm.tokenizer is not None
    prompts = [llm.tokenizer.encode(OPENINGS[index % len(OPENINGS)]) for index in range(count)]
    params = [SamplingParams(temperature=1.0, seed=seed + index, max_tokens=OWN_TOKENS) for index in range(count)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[*prompt, *output.outputs[0].token_ids] for prompt, output in zip(prompts, outputs, strict=True)]


def choose_texts(
    llm: LLM, cases: ReadOnlyList[Case], text: Path | None, calibration: str | None, count: int, seed: int
) -> tuple[str, list[HeldOut], Texts]:
    """A description of the texts that quality is measured on, these texts, and other texts for calibration.

    Args:
        cases: decide whether calibration texts are needed.
        text: a file to measure quality on; None: unseen stories, or texts of its own.
        calibration: "stories" or a text file; None: stories, or texts of its own.
        count: number of texts to measure quality on; of a file, at most ``paged_infer.quantize.NUM_TEXTS``.

    Raises:
        ValueError: no tokenizer, a file that cannot be read, one file for both, or a calibration that no method needs.
    """
    is_calibrated = any(case.method != "rtn" for case in cases)
    if llm.tokenizer is None:
        raise ValueError(f"{llm.name}: has no tokenizer, so it cannot read texts")
    if calibration is not None and not is_calibrated:
        raise ValueError(f"calibration={calibration!r}: method rtn uses no text")
    if text is not None and str(text) == calibration:
        raise ValueError(f"text={calibration!r}: is also the calibration text; measure on another one")
    if text is not None:
        words, held_out = (
            f"pieces of {text.name}",
            [*map(HeldOut, calibration_texts(llm.folder, str(text), seed, "text")[:count])],
        )
    elif llm.is_storyteller:
        words, held_out = "unseen stories", held_out_stories(llm, count, seed)
    else:
        words, held_out = "texts of its own", [*map(HeldOut, own_texts(llm, count, seed))]
    calibrating: Texts = ()
    if is_calibrated and (calibration is not None or llm.is_storyteller):
        calibrating = calibration_texts(llm.folder, calibration, seed)
    elif is_calibrated:
        calibrating = own_texts(llm, count, seed + count)
    num_tokens = sum(len(one.token_ids) for one in held_out)
    return f"{len(held_out)} {words}, {num_tokens:,} tokens", held_out, calibrating


def measure_cases(
    folder: Path,
    cases: ReadOnlyList[Case],
    texts: ReadOnlyList[HeldOut],
    calibrating: Texts,
    on_case: Callable[[str], None],
) -> tuple[list[Quality], list[Tensor]]:
    """The quality of the float model and of each case; and the float model's log-probabilities [T, V] for each text."""
    floats = load_decoder(folder, torch.float32, method_of=lambda name: DENSE)
    reference = [log_probs(floats, text.token_ids) for text in texts]
    found = [measure(partial(log_probs, floats), texts, reference, scheme="float32", method="-", bits=32.0)]
    for case in cases:
        decoder, bits = rounded_decoder(floats, case, calibrating)
        predict = partial(log_probs, decoder)
        found.append(measure(predict, texts, reference, scheme=case.scheme, method=case.method, bits=bits))
        on_case(f"{case.scheme} {case.method}")
    return found, reference


def measure(predict: Predict, texts: ReadOnlyList[HeldOut], reference: ReadOnlyList[Tensor], **of: Any) -> Quality:
    """Compare predictions with the reference's log-probabilities. ``of``: scheme, method and bits of the result."""
    kl = nats = agreed = right = 0.0
    num_tokens = num_asked = 0
    for text, before in zip(texts, reference, strict=True):
        found, ids = predict(text.token_ids), torch.tensor(text.token_ids)
        best, (divergences, agrees) = found.argmax(-1), token_distances(before, found)
        kl += divergences.sum().item()
        agreed += agrees.sum().item()
        nats -= found[:-1].gather(1, ids[1:, None]).sum().item()
        right += sum(torch.equal(best[at.start - 1 : at.stop - 1], ids[at]) for at in text.answers)
        num_tokens, num_asked = num_tokens + len(ids), num_asked + len(text.answers)
    return Quality(
        kl=kl / num_tokens,
        agreement=agreed / num_tokens,
        perplexity=math.exp(nats / (num_tokens - len(texts))),
        recall=right / num_asked if num_asked else None,
        **of,
    )


def rounded_decoder(decoder: Decoder, case: Case, calibrating: Texts) -> tuple[Decoder, float]:
    """A copy with quantised linear layers, and their bits per weight.

    Raises:
        ValueError: as ``quantise_decoder`` and ``quantise_nf4``.
    """
    decoder, grid = copy.deepcopy(decoder), case.grid
    if grid is None or grid.strategy == "tensor":  # ``is_plain``
        matrices = _matrices(decoder)
        for weight in matrices:
            left = dequantise_nf4(*quantise_nf4(weight)) if grid is None else rounded(weight, grid)
            weight.copy_(left)
        if grid is None:
            return decoder, 4 + 32 / BLOCK
        return decoder, grid.bits + SCALE_BITS * len(matrices) / sum(weight.numel() for weight in matrices)
    found = quantise_decoder(decoder, grid, case.method, () if case.method == "rtn" else calibrating)
    if case.rounds_inputs:
        for _, linear in decoder.linears():
            linear.register_forward_pre_hook(_round_inputs)
    num_weights = sum(weight.shape[0] * weight.shape[1] for weight in found.values())
    return decoder, sum(map(stored_bits, found.values())) / num_weights


def stored_bits(weight: QuantisedWeight) -> int:
    """Bits of a matrix as a checkpoint stores it: its codes, scales and zero points."""
    zero_bits = 0 if weight.zeros is None else weight.bits
    return weight.shape[0] * weight.shape[1] * weight.bits + weight.scales.numel() * (SCALE_BITS + zero_bits)


def _matrices(decoder: Decoder) -> list[Tensor]:
    """The linear layers' weights as views, separately as in the checkpoint: q, k and v are three."""
    linears = {linear for _, linear in decoder.linears()}
    return [
        target.module.weight.data[target.rows]
        for target in targets_of(decoder).values()
        if target.parameter == "weight" and target.module in linears
    ]


def _round_inputs(_: object, inputs: tuple[Tensor]) -> tuple[Tensor]:
    codes, scales = int8_tokens(inputs[0])
    return (codes * scales,)
