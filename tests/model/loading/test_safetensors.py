"""Weight files: those that transformers reads are read; a missing, truncated or contradictory one is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from decoding import IDS, logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from paged_infer.model.loading.load import load_decoder
from paged_infer.model.loading.safetensors import list_tensors, read_tensors


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


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
    with pytest.raises(ValueError, match=f"{name} is stored twice"):
        load_decoder(folder, torch.float32)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": {}}'])
def test_an_unreadable_index_is_named(text: str, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen2"), tmp_path)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_decoder(folder, torch.float32)


def test_weights_in_another_format_are_said_to_be_missing(checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing \(only safetensors are read\)"):
        load_decoder(folder, torch.float32)


def test_an_index_that_names_no_file_name_is_refused(checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen2"), tmp_path)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')
    with pytest.raises(ValueError, match="weight file 5 is missing"):
        load_decoder(folder, torch.float32)


def leave_shards(folder: Path, *, are_there: bool) -> None:
    """Write an index of other shards, as it stays in a folder that a single file was saved to later."""
    tensors = load_file(folder / "model.safetensors")
    if are_there:
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model-1-of-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1-of-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("are_there", [False, True])
def test_an_index_left_beside_a_whole_file_is_passed_over_as_in_transformers(are_there, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    leave_shards(folder, are_there=are_there)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits(load_decoder(folder, torch.float32), IDS), expected, atol=1e-4, rtol=1e-4)


def test_a_cut_shard_is_named_before_any_other_is_read(checkpoint, tmp_path, monkeypatch) -> None:
    folder = copy_of(checkpoint("qwen2"), tmp_path)
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    monkeypatch.setattr("paged_infer.model.loading.load.Decoder", None)
    with pytest.raises(ValueError, match=f"{re.escape(str(shard))}: cannot be read as safetensors, perhaps truncated"):
        load_decoder(folder, torch.float32)


def test_an_adapter_beside_the_weights_is_refused(checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has an adapter \(adapter_config.json\), which is not supported"):
        load_decoder(folder, torch.float32)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({}, r"config\.json: quantization_config quant_method=None: must be one of"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16}, r"missing tensor model\.layers\.0\..*q_proj\.qweight"),
    ],
)
def test_a_quantization_config_beside_plain_tensors_is_refused(scheme, message, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": scheme}))
    with pytest.raises(ValueError, match=message):
        load_decoder(folder, torch.float32)


def test_a_file_that_changes_after_its_header_was_read_is_named(checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen3"), tmp_path)
    path, wanted = folder / "model.safetensors", {tensor.name: tensor for tensor in list_tensors(folder)}
    save_file({"another": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: model\..* of F32 cannot be read"):
        list(read_tensors(wanted))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: cannot be read as safetensors, perhaps truncated"):
        list(read_tensors(wanted))
