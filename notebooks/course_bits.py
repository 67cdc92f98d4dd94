"""What chapter 15 measures with: the storyteller's matrices, stories that it has not seen, and products of few bits.

``course`` imports it on demand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from course import device, seeded
from torch import Tensor
from torch.nn import functional as F

from paged_infer import storyteller
from paged_infer.cache.none import NoCache
from paged_infer.kernels.cpu.linear import pack_c
from paged_infer.kernels.cpu.quant import pack_quantised
from paged_infer.kernels.quant.product import quantised_linear
from paged_infer.model.decoder import Decoder
from paged_infer.model.linear import DENSE
from paged_infer.model.loading.load import load_decoder
from paged_infer.model.quant.calibration import packed_step
from paged_infer.model.quant.scheme import Scheme, quantise
from paged_infer.quantize import calibration_texts
from paged_infer.storyteller.evaluation import document, quizzes
from paged_infer.storyteller.stories.grammar import FIRST_EVALUATION_SEED


def float_decoder() -> Decoder:
    """The storyteller in float32, each of its linear layers with one ``weight`` that may be changed; on ``device``."""
    return load_decoder(storyteller.PATH, torch.float32, device, method_of=lambda name: DENSE)


@dataclass(frozen=True)
class Stories:
    """Stories with questions, one after the other.

    Attributes:
        texts: the token ids of each.
        ids: of all, [T].
        rows: which tokens have a next one in their story, int64.
        answers: for each question, the rows after which the tokens of its answer come.
    """

    texts: list[list[int]]
    ids: Tensor
    rows: Tensor
    answers: list[Tensor]


def unseen_stories(tokenizer: Any, count: int) -> Stories:
    """The first ``count`` of those that evaluation asks about, which no training has seen."""
    texts, answers, rows, start = list[list[int]](), list[Tensor](), list[int](), 0
    for story in (storyteller.tell(FIRST_EVALUATION_SEED + i) for i in range(count)):
        texts.append(tokenizer.encode(document(story)))
        for prompt, answer in quizzes(story):
            first, last = (len(tokenizer.encode(text)) for text in (prompt, f"{prompt} {answer}"))
            answers.append(torch.arange(start + first - 1, start + last - 1, device=device))
        rows += range(start, start + len(texts[-1]) - 1)
        start += len(texts[-1])
    ids = torch.tensor([token for text in texts for token in text], device=device)
    return Stories(texts, ids, torch.tensor(rows, device=device), answers)


def training_stories(count: int) -> list[list[int]]:
    """Token ids of stories for calibration and training: none of them is asked about."""
    seeds = range(-(-count // 24))
    return [text for seed in seeds for text in calibration_texts(storyteller.PATH, None, seed)][:count]


@torch.inference_mode()
def story_log_probs(decoder: Any, stories: Stories, cache: NoCache | None = None) -> Tensor:
    """Of every token after each token: [T, V], by the package's decoder or one of ``my_engine``.

    Args:
        cache: what its attention reads keys and values from; None: as they are.
    """
    if not isinstance(decoder, Decoder):
        from my_engine.cache import NoCache as Mine

        hidden = [decoder(text, range(len(text)), Mine()) for text in stories.texts]
        return decoder.logits(torch.cat(hidden)).log_softmax(-1)
    _, step = packed_step(stories.texts, device)
    return decoder.logits(decoder(stories.ids, cache or NoCache(decoder.kv_spec()), step)).float().log_softmax(-1)


def inputs_of(decoder: Decoder, name: str, stories: Stories) -> Tensor:
    """What the linear layer ``name`` is given for each token of the stories: [T, K]."""
    seen = list[Tensor]()
    watch = dict(decoder.linears())[name].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    story_log_probs(decoder, stories)
    watch.remove()
    return seen[0]


def product_calls(size: int, copies: int, rows: tuple[int, ...]) -> tuple[dict[str, float], dict[Any, Callable]]:
    """Products of x [rows, size] in bfloat16 with matrices [size, size], by the device's kernels where it has any.

    Returns:
        the bytes of a matrix in each form, and for each (form, rows) a call. It takes another copy of the matrix each
        time, so that no cache holds it.
    """
    weight = seeded(0, size, size)
    int8, int4 = quantise(weight, Scheme(8)), quantise(weight, Scheme(4, True, "group", 128))
    makes = {
        "bfloat16": lambda: _dense(weight.bfloat16()),
        "W8A16": lambda: pack_quantised(int8, None) or partial(quantised_linear, weight=int8),
        "W4A16": lambda: pack_quantised(int4, None) or partial(quantised_linear, weight=int4),
        "W8A8": lambda: (
            pack_quantised(int8, None, "int8") or partial(quantised_linear, weight=int8, activations="int8")
        ),
    }
    num_bytes = {"bfloat16": 2 * size**2, "W8A16": int8.num_bytes, "W4A16": int4.num_bytes, "W8A8": int8.num_bytes}
    calls = {}
    for form, make in makes.items():
        turns = cycle([make() for _ in range(copies)])
        for count in rows:
            x = seeded(1, count, size).bfloat16()
            calls[form, count] = lambda turns=turns, x=x: next(turns)(x)
    return num_bytes, calls


def _dense(weight: Tensor) -> Callable[[Tensor], Tensor]:
    product = pack_c(weight, None) if device.type == "cpu" else None
    return partial(F.linear, weight=weight.clone()) if product is None else product
