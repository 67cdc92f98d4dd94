"""The laws of the engine, with weights in every quantised format and every type of KV cache.

``make test`` draws some of all triples (weights, type of the cache, what happens to the requests), and
``make nightly`` runs them all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB
from effort import EFFORT
from gguf_files import random_model, save_gguf
from quantised_folders import AWQ, awq, compressed_plain, compressed_words, fp8_blocks, gptq, write_pair

from paged_infer import LLM, BeamSearchParams, SamplingParams
from paged_infer.kernels.cpu import paged_attention
from paged_infer.kernels.cpu.build import unavailable_reason
from paged_infer.kernels.kv_quant import KV_DTYPES
from paged_infer.kernels.op_sets import C_OPS, TORCH_OPS
from paged_infer.model.loading.load import load_decoder
from paged_infer.model.quant.methods import QuantisedMethod

PROJ = r"_proj|\.w[123]"
PER_TOKEN = {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token"}


def rounds_inputs(dtype: torch.dtype) -> tuple[dict[str, Any], Any]:
    config, pack = compressed_plain("channel", dtype)
    kind = "int" if dtype == torch.int8 else "float"
    config["config_groups"]["group_0"]["input_activations"] = {**PER_TOKEN, "type": kind}
    return config, pack


FOLDERS = {
    "folder of w4a16": compressed_words(4, symmetric=False),
    "folder of w8a8": rounds_inputs(torch.int8),
    "folder of float8": compressed_plain("channel", torch.float8_e4m3fn),
    "folder of float8 x float8": rounds_inputs(torch.float8_e4m3fn),
    "fp8 blocks": fp8_blocks(32, 16),
    "awq": (AWQ, awq),
    "gptq, act-order": gptq(4, 1, "shared"),
}
OPTIONS = {  # of a family that is quantised only while loading
    "w8a16": ("qwen3", "w8a16"),
    "w4a16": ("mistral", "w4a16"),
    "w8a8": ("qwen3", "w8a8"),
    "w4a16 of experts": ("mixtral", "w4a16"),
    "w8a16 of latents": ("deepseek3", "w8a16"),
}
BLOCKS = ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"]
WEIGHTS = [*OPTIONS, *FOLDERS, *BLOCKS]
ROUNDING_INPUTS = ("w8a8", "folder of w8a8", "folder of float8 x float8")
CACHES = ["auto", *KV_DTYPES]

SMALL = {"num_blocks": 24, "block_size": 4, "max_num_seqs": 5, "max_num_batched_tokens": 24}
EVENTS: dict[str, dict[str, Any]] = {
    "company": {"max_num_seqs": 8},
    "chunks": {"max_num_batched_tokens": 7, "block_size": 3, "num_blocks": 200},
    "recomputed": SMALL,
    "swapped": {**SMALL, "preemption_mode": "swap"},
    "shared prefixes": {"block_size": 3, "num_blocks": 200},
    "drafts": {"block_size": 4, "num_blocks": 80},  # by the model itself
    "beams": {"block_size": 3, "num_blocks": 60, "preemption_mode": "swap"},
}
ROOMY = {"num_blocks": 256, "max_num_seqs": 3, "enable_prefix_caching": False}  # three: beams of one request
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
BEAMS = BeamSearchParams(beam_width=3, max_tokens=6)


def drawn() -> list[Any]:
    """With an EFFORT of 1 each format of weights is paired with two types of cache, and each pair with one event."""
    triples = [
        pytest.param(weights, kind, event, id=f"{weights}-{kind}-{event}")
        for i, weights in enumerate(WEIGHTS)
        for j, kind in enumerate(CACHES)
        for k, event in enumerate(EVENTS)
        if EFFORT > 1 or ((i + j) % 2 == 0 and k == (3 * i + 2 * j) % len(EVENTS))
    ]
    assert {one.values[i] for one in triples for i in range(3)} == {*WEIGHTS, *CACHES, *EVENTS}
    return triples


def prompts() -> list[list[int]]:
    """Two share a prefix, and one repeats itself."""
    rng = random.Random(3)
    numbers = [[rng.randrange(2, VOCAB) for _ in range(n)] for n in (1, 5, 30, 17, 12)]
    return [*numbers, numbers[2][:24] + numbers[1], numbers[4] * 3]


@pytest.fixture(scope="module")
def source(checkpoint, tmp_path_factory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Name of a format -> the model, and the options that it needs."""

    @cache
    def make(weights: str) -> tuple[Path, dict[str, Any]]:
        if weights in OPTIONS:
            family, scheme = OPTIONS[weights]
            return checkpoint(family), {"quantization": scheme}
        folder = tmp_path_factory.mktemp("few_bits")
        if weights in FOLDERS:
            return write_pair(checkpoint("qwen3"), folder, *FOLDERS[weights], PROJ)[0], {}
        save_gguf(folder / "model.gguf", random_model("llama"), weights)
        return folder / "model.gguf", {"quantization": "gguf"}

    return make


@pytest.fixture(scope="module")
def alone(source) -> Callable[..., Any]:
    """Weights and type of the cache -> each prompt's tokens in an engine with a large pool and no other request."""

    @cache
    def run(weights: str, kind: str, beams: bool) -> Any:
        path, options = source(weights)
        llm = LLM(path, **options, kv_cache_dtype=kind, device="cpu", **ROOMY)
        return [token_ids(llm, [prompt], beams)[0] for prompt in asked(beams)]

    return run


def asked(beams: bool) -> list[list[int]]:
    return prompts()[2:5] if beams else prompts()


def token_ids(llm: LLM, texts: list[list[int]], beams: bool) -> list[list[list[int]]]:
    outputs = llm.beam_search(texts, BEAMS) if beams else llm.generate(texts, GREEDY, use_tqdm=False)
    llm.check_integrity()
    assert llm.stats()["free_blocks"] == llm.stats()["num_blocks"]
    return [[one.token_ids for one in output.outputs] for output in outputs]


@pytest.mark.parametrize(("weights", "kind", "event"), drawn())
def test_tokens_are_those_of_each_request_alone(weights, kind, event, source, alone, monkeypatch) -> None:
    """Where activations are quantised, attention has to keep a row's bits in any chunk (``test_w8a8_laws``)."""
    if weights in ROUNDING_INPUTS:
        monkeypatch.setattr(paged_attention, "_FEW", 10**9)
    path, options = source(weights)
    options, beams = {**options, **EVENTS[event], "kv_cache_dtype": kind, "device": "cpu"}, event == "beams"
    if event == "drafts":
        options["speculative_config"] = {"method": "draft_model", "model": str(path), "num_speculative_tokens": 2}
    llm = LLM(path, **options)
    expected = alone(weights, kind, beams)
    assert token_ids(llm, asked(beams), beams) == expected
    if event == "shared prefixes":
        assert token_ids(llm, asked(beams), beams) == expected
    stats = llm.stats()
    happened = {
        "recomputed": "preemptions",
        "swapped": "blocks_swapped_in",
        "shared prefixes": "prefix_hit_tokens",
        "drafts": "num_draft_tokens",
        "beams": "blocks_copied",
    }
    assert event not in happened or stats[happened[event]] > 0
    assert len({str(one) for one in expected}) > len(expected) / 2  # otherwise equality would prove little


# -- Batch invariance --------------------------------------------------------------------------------------------------

HAS_C = unavailable_reason() is None


@pytest.mark.parametrize("ops", [TORCH_OPS, pytest.param(C_OPS, marks=pytest.mark.skipif(not HAS_C, reason="no C"))])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_row_has_the_same_bits_in_any_company_by_every_products(weights, ops, source) -> None:
    path, options = source(weights)
    decoder = load_decoder(path, torch.float32, ops=ops, **options)
    few = [one for _, one in decoder.linears() if type(one.method) is QuantisedMethod and not one.is_stack]
    assert few
    for linear in few[:4]:
        x = torch.randn(70, linear.in_features)
        whole = linear(x)
        for rows in (slice(0, 1), slice(5, 9), slice(30, 70)):
            assert torch.equal(linear(x[rows]), whole[rows])
