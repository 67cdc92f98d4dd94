"""Weights: a checkpoint loads whole, or not at all and with the culprit named; loaded, it computes what it should."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, LLAMA3_ROPE, VOCAB
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from paged_infer.baselines import generate_naive
from paged_infer.cache.none import NoCache
from paged_infer.cache.spec import StepMeta
from paged_infer.model.decoder import Decoder
from paged_infer.model.weights import load_decoder
from paged_infer.params import SamplingParams

IDS = [5, 900, 17, 17, 2, 333, 64, 1002, 40, 8, 77, 3, 250, 251, 252, 6, 9, 12]


def logits(decoder: Decoder, token_ids: list[int]) -> Tensor:
    length = len(token_ids)
    unused = torch.empty(0, dtype=torch.int64)
    step = StepMeta(
        positions=torch.arange(length),
        slot_mapping=unused,
        query_start_loc=torch.tensor([0, length], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        block_tables=unused,
        num_decodes=0,
        max_query_len=length,
        max_seq_len=length,
    )
    return decoder.logits(decoder(torch.tensor(token_ids), NoCache(decoder.kv_spec()), step))


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Apply ``change`` to the tensors of the folder's single weight file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, checkpoint, twin) -> None:
    decoder = load_decoder(checkpoint(family), torch.float32)
    with torch.inference_mode():
        expected = twin(family)(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits(decoder, IDS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "rope", [{"rope_type": "linear", "factor": 3.0}, {"rope_type": "default"}, LLAMA3_ROPE]
)
def test_every_rope_type_gives_the_logits_of_transformers(rope: dict[str, Any], tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.2,
        rope_parameters={"rope_theta": 700.0, **rope},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    ids = IDS * 8  # beyond the length that llama3's stretch leaves alone
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(
        logits(load_decoder(tmp_path, torch.float32), ids), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_half_precision_checkpoint_loads_in_any_dtype(family, dtype, twin, tmp_path) -> None:
    model = AutoModelForCausalLM.from_config(twin(family).config).to(dtype)
    model.load_state_dict(twin(family).state_dict())
    model.save_pretrained(tmp_path)
    same, wide = load_decoder(tmp_path, dtype), load_decoder(tmp_path, torch.float32)
    assert {p.dtype for p in same.parameters()} == {dtype}
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        expected = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits(wide, IDS), expected, atol=1e-4, rtol=1e-4)
    error = (logits(same, IDS).float() - expected).abs().mean() / expected.abs().mean()
    assert error < (0.15 if dtype is torch.bfloat16 else 0.03)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_rung_runs_in_half_precision(dtype: str, make_llm) -> None:
    llm = make_llm("qwen2-window", dtype=dtype)
    params = SamplingParams(temperature=0, max_tokens=4)
    assert len(llm.generate(IDS, params, use_tqdm=False)[0].outputs[0].token_ids) == 4
    assert len(generate_naive(llm, IDS, params)[0].outputs[0].token_ids) == 4


def bias_twice(tensors: dict[str, Tensor]) -> None:
    tensors["h.0.ln_1.bias"] = tensors["transformer.h.0.ln_1.bias"].clone()


def other_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = torch.zeros(VOCAB, 192)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen3", lambda t: t.pop("model.layers.1.self_attn.k_norm.weight"),
         "missing tensor model.layers.1.self_attn.k_norm.weight [24]"),
        ("qwen3", lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(2, 2)}),
         "unexpected tensor model.layers.3.mlp.up_proj.weight [2, 2]"),
        ("qwen3", lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(144)}),
         "unexpected tensor model.layers.0.self_attn.q_proj.bias [144]"),
        ("mistral", lambda t: t.update({"model.norm.weight": torch.zeros(191)}),
         "model.norm.weight is [191], not [192]"),
        ("mistral", lambda t: t.update({"model.layers.0.mlp.down_proj.weight": torch.zeros(272, 192)}),
         "model.layers.0.mlp.down_proj.weight is [272, 192], not [192, 272]"),
        ("gpt2", lambda t: t.update({"transformer.h.2.attn.c_attn.weight": torch.zeros(576, 192)}),
         "transformer.h.2.attn.c_attn.weight is [576, 192], not [192, 576]"),
        ("gpt2", bias_twice, "ln_1.bias is there twice"),
        ("gpt2", other_head, "lm_head.weight differs from the embedding"),
        ("qwen3", other_head, "lm_head.weight differs from the embedding"),
        ("mistral", lambda t: t.pop("lm_head.weight"), "missing tensor lm_head.weight [1003, 192]"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_named_with_its_shape(family, change, message, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint(family), tmp_path)
    rewrite(folder, change)
    with pytest.raises(ValueError) as refusal:
        load_decoder(folder, torch.float32)
    assert message in str(refusal.value) and "1 problem(s)" in str(refusal.value)


def test_every_problem_is_named_at_once(checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(3)]
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in names])
    with pytest.raises(ValueError) as refusal:
        load_decoder(folder, torch.float32)
    assert all(name in str(refusal.value) for name in names)


@pytest.mark.parametrize("num_kept", [0, 4, 100, 20_000])
def test_a_truncated_file_is_named(num_kept: int, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_kept])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_decoder(folder, torch.float32)


def test_a_missing_shard_is_named(checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen2"), tmp_path)
    shard = sorted(folder.glob("model-*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        load_decoder(folder, torch.float32)


def test_a_tensor_in_two_shards_is_named(checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen2"), tmp_path)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    with pytest.raises(ValueError, match=f"{name} is there twice"):
        load_decoder(folder, torch.float32)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_an_unreadable_index_is_named(text: str, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen2"), tmp_path)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_decoder(folder, torch.float32)


def test_weights_in_another_format_are_said_to_be_missing(checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.safetensors is not there \(only safetensors are read\)"):
        load_decoder(folder, torch.float32)


def test_a_config_that_fits_other_weights_is_an_error_and_not_garbage(checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 2, "layer_types": None}))
    with pytest.raises(ValueError, match=r"unexpected tensor model\.layers\.2"):
        load_decoder(folder, torch.float32)


def test_a_tied_head_that_is_stored_too_is_accepted(checkpoint, twin, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    decoder = load_decoder(folder, torch.float32)
    assert decoder.head.weight is decoder.embedding.weight


def test_the_first_gpt2_checkpoints_load_too(checkpoint, tmp_path) -> None:
    """Without "transformer." in front, and with the causal masks that they stored as weights."""
    folder = copy_of(checkpoint("gpt2"), tmp_path)

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)

    rewrite(folder, rename)
    ours, theirs = load_decoder(folder, torch.float32), load_decoder(checkpoint("gpt2"), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
