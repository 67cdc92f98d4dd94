"""What a grammar costs: ``python -m paged_infer.bench.grammar_cost [MODEL]``.

Measured per token, over random documents of one JSON schema: computing the mask and accepting the token, and masking
one row of logits. First with the native grammar and the model's vocabulary (the storyteller's by default), then with
each library that is installed and a made-up vocabulary of 151,936 tokens. Last, the model's tokens/s with a grammar
that allows everything, and without, for the same tokens.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from paged_infer import LLM, SamplingParams, StructuredOutputsParams
from paged_infer.control.guided.grammar import Grammar, NativeGrammar
from paged_infer.control.guided.vocabulary import Vocabulary, allowed_ids
from paged_infer.kernels.op_sets import C_OPS
from paged_infer.sampling.grammar_libraries import LIBRARIES, is_installed

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
        "kind": {"enum": ["cat", "dog", "fish"]},
    },
    "required": ["name", "age", "tags", "kind"],
    "additionalProperties": False,
}
NUM_DOCUMENTS, MAX_TOKENS = 60, 60
LARGE = 151_936


def main(model: str | None = None) -> None:
    llm = LLM(model)
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    size, eos = llm.engine.model_config.vocab_size, llm.engine.model_config.eos_token_ids
    small = Vocabulary(tokenizer.vocabulary_bytes(), eos, size)
    print("per token, us: mask and accept, then with the masking of one row;  p50 / p99 / first visits p50")
    _report(f"native, {size:,} tokens", lambda: NativeGrammar("json", json.dumps(SCHEMA), small), size)
    large = Vocabulary(made_tokens(), [LARGE - 1], LARGE)
    _report(f"native, {LARGE:,} tokens", lambda: NativeGrammar("json", json.dumps(SCHEMA), large), LARGE)
    for name in filter(is_installed, LIBRARIES):
        library = LIBRARIES[name](large, LARGE)
        _report(f"{name}, {LARGE:,} tokens", lambda library=library: library.compile("json", json.dumps(SCHEMA)), LARGE)  # type: ignore[misc]
    for batch in (1, 32):
        free, guided = (_tokens_per_s(llm, batch, regex) for regex in (None, r"[^\x00]*"))
        print(f"{batch} requests: {free:.0f} tokens/s without a grammar, {guided:.0f} with one: {guided / free:.3f}")


def made_tokens() -> list[bytes | None]:
    """A byte-level vocabulary: all bytes, words with and without a space, digits, punctuation, other scripts."""
    rng = random.Random(0)
    found = dict.fromkeys(bytes([byte]) for byte in range(256))
    while len(found) < LARGE - 1:
        word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(1, 9)))
        other = "".join(rng.choice("éüñ中文日本語абвгд") for _ in range(rng.randint(1, 4)))
        sign = rng.choice(['"', ",", '","', '": "', '{"', '":', "},", "[", "0.", "-", "\n"])
        found[rng.choice([word, " " + word, " " + word, word.capitalize(), sign + word, other]).encode()] = None
    return [*found, None]


def _report(name: str, compiled: Callable[[], Grammar], vocab_size: int) -> None:
    began = time.perf_counter()
    grammar = compiled()
    compile_s = time.perf_counter() - began
    logits = torch.randn(1, vocab_size)
    masked, applied = list[float](), list[float]()
    rounds: list[list[float]] = []
    for _ in range(2):  # the native grammar reaches most of its states in the first
        masked, applied = [], []
        for seed in range(NUM_DOCUMENTS):
            _walk(grammar, random.Random(seed), logits, masked, applied)
        rounds.append(list(masked))
    both = [a + b for a, b in zip(masked, applied, strict=True)]
    print(
        f"{name:28} compiled in {compile_s * 1e3:6.1f} ms; {_us(masked, 0.5)} / {_us(masked, 0.99)} / "
        f"{_us(rounds[0], 0.5)}, masked {_us(both, 0.5)} / {_us(both, 0.99)}  ({len(masked)} tokens)"
    )


def _walk(
    grammar: Grammar, rng: random.Random, logits: torch.Tensor, masked: list[float], applied: list[float]
) -> None:
    matcher = grammar.matcher()
    for _ in range(MAX_TOKENS):
        if matcher.is_finished:
            return
        began = time.perf_counter()
        bits = matcher.mask() or b""  # a grammar always has one
        mask_s = time.perf_counter() - began
        began = time.perf_counter()
        C_OPS.mask_logits(logits, torch.frombuffer(bytearray(bits), dtype=torch.int32).view(1, -1))
        applied.append(time.perf_counter() - began)
        token_id = rng.choice(allowed_ids(bits))
        began = time.perf_counter()
        matcher.accept(token_id)
        masked.append(mask_s + time.perf_counter() - began)


def _us(seconds: list[float], share: float) -> str:
    return f"{sorted(seconds)[int(share * (len(seconds) - 1))] * 1e6:.0f}"


def _tokens_per_s(llm: LLM, batch: int, regex: str | None) -> float:
    grammar = None if regex is None else StructuredOutputsParams(regex=regex)
    params = SamplingParams(temperature=0, max_tokens=64, structured_outputs=grammar)
    prompts = [f"Once upon a time there were {number}" for number in range(batch)]
    runs = []
    for _ in range(4):  # the first warms up
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        runs.append(num_tokens / (time.perf_counter() - began))
    return median(runs[1:])


if __name__ == "__main__":
    main(*sys.argv[1:2])
