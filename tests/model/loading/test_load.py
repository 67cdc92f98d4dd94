"""A checkpoint loads completely and computes what it should, or is refused with the wrong tensors named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, VOCAB
from decoding import IDS, logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from paged_infer.baselines import generate_naive
from paged_infer.model.config import ModelConfig
from paged_infer.model.loading import load as weights
from paged_infer.model.loading.load import load_decoder, saved_dtype
from paged_infer.params import SamplingParams


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Apply ``change`` to the tensors of the folder's single weight file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, checkpoint, transformers_model) -> None:
    decoder = load_decoder(checkpoint(family), torch.float32)
    with torch.inference_mode():
        expected = transformers_model(family)(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits(decoder, IDS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_half_precision_checkpoint_loads_in_any_dtype(family, dtype, transformers_model, tmp_path) -> None:
    model = AutoModelForCausalLM.from_config(transformers_model(family).config).to(dtype)
    model.load_state_dict(transformers_model(family).state_dict())
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
        ("gpt2", bias_twice, "ln_1.bias is stored twice"),
        ("gpt2", other_head, "lm_head.weight differs from the embedding"),
        ("qwen3", other_head, "lm_head.weight differs from the embedding"),
        ("mistral", lambda t: t.pop("lm_head.weight"), "missing tensor lm_head.weight [1003, 192]"),
        ("qwen3", lambda t: t.pop("model.embed_tokens.weight"), "missing tensor model.embed_tokens.weight [1003, 192]"),
        ("qwen3", lambda t: t.update({"norm.weight": torch.ones(192)}), "norm.weight is stored twice"),
        ("qwen3", lambda t: t.update({"model.layers.0.attn.bias": torch.ones(4)}),
         "unexpected tensor model.layers.0.attn.bias [4]"),
        ("mistral", lambda t: t.update({"model.norm.weight": torch.ones(192, dtype=torch.int8)}),
         "model.norm.weight is stored as I8; weights must be floats"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_named_with_its_shape(family, change, message, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint(family), tmp_path)
    rewrite(folder, change)
    with pytest.raises(ValueError) as refusal:
        load_decoder(folder, torch.float32)
    assert message in str(refusal.value) and "1 problem(s)" in str(refusal.value)


def rewrite_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def test_every_problem_is_named_at_once(checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(3)]
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in names])
    with pytest.raises(ValueError) as refusal:
        load_decoder(folder, torch.float32)
    assert all(name in str(refusal.value) for name in names)


def test_a_config_that_fits_other_weights_is_an_error_and_not_garbage(checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    rewrite_config(folder, num_hidden_layers=2, layer_types=None)
    with pytest.raises(ValueError, match=r"unexpected tensor model\.layers\.2"):
        load_decoder(folder, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 10**9}, "model.embed_tokens.weight is [1003, 192], not [1000000000, 192]"),
        ({"hidden_size": 2**30}, "hidden_size=1073741824: must be an integer from 1 to 1048576"),
        ({"intermediate_size": 2**20}, "parameters without the embeddings, but the tensors have only 885264 elements"),
        ({"intermediate_size": 2**13}, "mlp.up_proj.weight is [272, 192], not [8192, 192]"),
        ({"num_hidden_layers": 10_000}, "num_hidden_layers=10000, but there are only 35 tensors"),
        ({"num_hidden_layers": 30}, "and 277 more"),
    ],
    ids=str,
)
def test_a_config_of_an_absurd_size_is_refused_before_anything_is_allocated(
    changes: dict[str, Any], message: str, checkpoint, tmp_path, monkeypatch
) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    rewrite_config(folder, **changes, layer_types=None)
    monkeypatch.setattr(weights, "Decoder", None)
    with pytest.raises(ValueError) as refusal:
        load_decoder(folder, torch.float32)
    assert message in str(refusal.value) and str(refusal.value).count("\n") <= weights.MAX_PROBLEMS + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 2**31 - 1, "hidden_size": 2**20},
        {"intermediate_size": 2**20, "num_hidden_layers": 9999, "layer_types": None},
    ],
    ids=str,
)
def test_dummy_weights_that_no_memory_holds_are_refused_in_bytes(changes, checkpoint, tmp_path, make_llm) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    rewrite_config(folder, **changes)
    with pytest.raises(ValueError, match=r"parameters as torch.float32 need \d{13,} bytes, but cpu has \d+ available"):
        make_llm(folder, load_format="dummy")


def test_weights_that_do_not_fit_are_refused_and_those_that_just_fit_are_not(checkpoint, monkeypatch) -> None:
    folder = checkpoint("qwen3")
    num_bytes = 4 * ModelConfig.from_pretrained(folder).num_parameters
    monkeypatch.setattr(weights, "available_bytes", lambda device: num_bytes)
    load_decoder(folder, torch.float32)
    monkeypatch.setattr(weights, "available_bytes", lambda device: num_bytes - 1)
    with pytest.raises(ValueError, match=f"need {num_bytes} bytes, but cpu has {num_bytes - 1} available"):
        load_decoder(folder, torch.float32)


def strip_prefix(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.").removeprefix("transformer.")] = tensors.pop(name)


def repeat_prefix(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[f"{'transformer' if name.startswith('transformer') else 'model'}.{name}"] = tensors.pop(name)


def keep_only_the_head(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
    tensors["lm_head.weight"] = tensors.pop(name)


def both(tensors: dict[str, Tensor]) -> None:
    keep_only_the_head(tensors)
    strip_prefix(tensors)


@pytest.mark.parametrize(
    ("family", "change"),
    [(f, c) for f in ("qwen3", "llama3", "gpt2") for c in (strip_prefix, repeat_prefix, keep_only_the_head, both)]
    + [("mistral", strip_prefix), ("mistral", repeat_prefix)],
)
def test_other_names_of_the_same_tensors_load_as_in_transformers(
    family, change, checkpoint, transformers_model, tmp_path
) -> None:
    folder = copy_of(checkpoint(family), tmp_path)
    rewrite(folder, change)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())  # transformers uses each tensor, and misses none
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0]
    decoder = load_decoder(folder, torch.float32)
    torch.testing.assert_close(logits(decoder, IDS), expected, atol=1e-4, rtol=1e-4)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(
            decoder.parameters(), load_decoder(checkpoint(family), torch.float32).parameters(), strict=True
        )
    )


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_base_model_saved_by_itself_generates_what_transformers_does(
    family, transformers_model, make_llm, tmp_path
) -> None:
    transformers_model(family).base_model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = model.generate(torch.tensor([IDS]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outputs = make_llm(tmp_path).generate(IDS, params, use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == expected[0, len(IDS) :].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_config_without_a_dtype_has_that_of_its_weights_as_in_transformers(dtype, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    rewrite(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    rewrite_config(folder, dtype=None)
    assert f"torch.{saved_dtype(folder)}" == str(AutoModelForCausalLM.from_pretrained(folder).dtype) == str(dtype)
    rewrite_config(folder, dtype="float16")
    assert saved_dtype(folder) == "float16"


def test_a_saved_dtype_that_nothing_computes_in_is_refused(checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    rewrite_config(folder, dtype="float64")
    with pytest.raises(ValueError, match="saved as float64; set dtype to float32, float16 or bfloat16"):
        saved_dtype(folder)


def test_a_tied_head_that_is_stored_too_is_accepted(checkpoint, transformers_model, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    decoder = load_decoder(folder, torch.float32)
    assert decoder.head.weight is decoder.embedding.weight


def test_the_first_gpt2_checkpoints_load_too(checkpoint, tmp_path) -> None:
    """Their names lack the prefix "transformer.", and they store causal masks as weights."""
    folder = copy_of(checkpoint("gpt2"), tmp_path)

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)

    rewrite(folder, rename)
    ours, theirs = load_decoder(folder, torch.float32), load_decoder(checkpoint("gpt2"), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_model_opens_without_importing_torchs_compiler() -> None:
    """Importing it would take longer than loading, and an operation on the meta device can cause it."""
    code = """
import sys, torch
from paged_infer import storyteller
from paged_infer.model.loading.load import load_decoder
load_decoder(storyteller.PATH, torch.float32)
sys.exit("torch._dynamo" in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
