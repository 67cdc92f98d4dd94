"""``paged-infer quantize`` writes folders that transformers loads, with the logits of the dequantised weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import IDS, logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from paged_infer import LLM, SamplingParams, storyteller
from paged_infer.cli import app
from paged_infer.kernels.op_sets import C_OPS, TORCH_OPS
from paged_infer.model.loading.load import load_decoder
from paged_infer.quantize import calibration_texts, quantize

WORDS = "Mia had a red key. She put it under the bed, and the dog saw it. " * 40


def in_transformers(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def their_logits(model: Any, ids: list[int] = IDS) -> Tensor:
    return model(torch.tensor([ids])).logits[0]


def by_hand(folder: Path) -> dict[str, Tensor]:
    """The folder's tensors dequantised by the published description of the format."""
    stored, dense = load_file(folder / "model.safetensors"), {}
    for name, tensor in stored.items():
        if name.endswith("weight_packed"):
            module = name.removesuffix("_packed")
            scales, (rows, columns) = stored[f"{module}_scale"], stored[f"{module}_shape"].tolist()
            bits = 4 if tensor.shape[1] == -(-columns // 8) else 8
            codes = (tensor[:, :, None] >> torch.arange(0, 32, bits) & 2**bits - 1).flatten(1) - 2 ** (bits - 1)
            codes = codes[:, :columns].float().view(rows, scales.shape[1], -1)
            dense[module] = (codes * scales[:, :, None]).view(rows, columns)
        elif tensor.dtype == torch.int8:
            scales = stored[f"{name}_scale"]
            dense[name] = (tensor.float().view(len(tensor), scales.shape[1], -1) * scales[:, :, None]).flatten(1)
        elif not name.endswith(("_scale", "_shape")):
            dense[name] = tensor.float()
    return dense


def as_floats(source: Path, parent: Path) -> Path:
    """A dense checkpoint of what ``parent / "out"``, made of ``source``, stands for."""
    folder = parent / "floats"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_file(by_hand(parent / "out"), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_w4a16_in_transformers_is_the_hand_dequantised_model_to_the_bit(tmp_path: Path) -> None:
    quantize("storyteller", tmp_path / "out")
    ours, plain = in_transformers(tmp_path / "out"), in_transformers(storyteller.PATH)
    missing, unexpected = plain.load_state_dict(by_hand(tmp_path / "out"), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied
    assert torch.equal(their_logits(ours), their_logits(plain))
    torch.testing.assert_close(logits(load_decoder(tmp_path / "out", torch.float32), IDS), their_logits(plain))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {"scheme": "w8a16"}),
        ("llama-biased", {"scheme": "w8a16", "group_size": 16}),
        ("phi3", {"group_size": 16}),
        ("gemma3", {"method": "awq", "group_size": 8}),
        ("smollm3", {"method": "gptq", "group_size": 16}),
        ("olmo2", {"method": "awq", "group_size": 16}),
    ],
)
def test_weight_only_folders_give_transformers_the_logits_of_their_weights(
    family: str, options: dict[str, Any], checkpoint, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("paged_infer.quantize.calibration_texts", lambda *_: [IDS])
    quantize(str(checkpoint(family)), tmp_path / "out", **options)
    plain = in_transformers(checkpoint(family))
    _, unexpected = plain.load_state_dict(by_hand(tmp_path / "out"), strict=False)
    assert not unexpected
    assert torch.equal(their_logits(in_transformers(tmp_path / "out")), their_logits(plain))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"group_size": 4}),
        ("mixtral", {"scheme": "w8a16"}),
        ("qwen2-moe", {"scheme": "w8a16", "group_size": 2, "method": "gptq"}),
        ("qwen3-moe", {"method": "gptq", "group_size": 4}),
        ("deepseek3", {"scheme": "w8a16"}),
    ],
)
def test_experts_are_quantised_one_by_one_and_routers_stay(family, options, checkpoint, tmp_path, monkeypatch) -> None:
    """The logits are those of the dequantised tensors, in this engine and in transformers, which dequantises them."""
    monkeypatch.setattr("paged_infer.quantize.calibration_texts", lambda *_: [IDS])
    report = quantize(str(checkpoint(family)), tmp_path / "out", **options)
    stored = load_file(tmp_path / "out/model.safetensors")
    experts = [name for name in stored if ".experts." in name and name.endswith(("weight_packed", "weight_scale"))]
    assert len(experts) > 10
    assert all(
        stored[name].is_floating_point() for name in stored if name.endswith(("gate.weight", "kv_b_proj.weight"))
    )
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert any(name.endswith("gate") for name in section["ignore"]) and report.num_quantised > 0
    floats = as_floats(checkpoint(family), tmp_path)
    ours = load_decoder(tmp_path / "out", torch.float32)
    torch.testing.assert_close(
        logits(ours, IDS), logits(load_decoder(floats, torch.float32), IDS), atol=2e-4, rtol=1e-3
    )
    theirs = their_logits(in_transformers(tmp_path / "out"))
    torch.testing.assert_close(theirs, their_logits(in_transformers(floats)), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logits(ours, IDS), theirs, atol=2e-3, rtol=2e-3)


def test_experts_in_w8a8_are_for_this_engine_and_a_warning_says_so(checkpoint, tmp_path: Path, caplog) -> None:
    quantize(str(checkpoint("mixtral")), tmp_path / "out", scheme="w8a8")
    assert "experts in w8a8: transformers 5.23 does not load such a folder, this engine does" in caplog.text
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        in_transformers(tmp_path / "out")
    with_rounded_inputs = logits(load_decoder(tmp_path / "out", torch.float32), IDS)
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    (tmp_path / "out/config.json").write_text(json.dumps(config))  # without rounded inputs they are the floats
    expected = logits(load_decoder(as_floats(checkpoint("mixtral"), tmp_path), torch.float32), IDS)
    found = logits(load_decoder(tmp_path / "out", torch.float32), IDS)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(with_rounded_inputs, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("wide", ["up", "down"])
def test_one_matrix_of_the_experts_may_stay_dense(wide: str, checkpoint, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("paged_infer.quantize.calibration_texts", lambda *_: [IDS])
    monkeypatch.setattr("paged_infer.quantize.stay_wide", lambda *_: [f"layers.0.mlp.experts.{wide}"])
    quantize(str(checkpoint("mixtral")), tmp_path / "out", group_size=4, keep_wide=0.3)
    assert "this engine loads such a folder, transformers 5.23 does not" in caplog.text
    expected = logits(load_decoder(as_floats(checkpoint("mixtral"), tmp_path), torch.float32), IDS)
    for ops in (TORCH_OPS, C_OPS):
        found = logits(load_decoder(tmp_path / "out", torch.float32, ops=ops), IDS)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def test_w8a8_in_transformers_rounds_inputs_by_the_published_rule(tmp_path: Path) -> None:
    """For each token: scale = max |x| / 127.5, codes -128 .. 127, as for each row of the weights."""
    quantize("storyteller", tmp_path / "out", scheme="w8a8", method="smoothquant")
    plain = in_transformers(storyteller.PATH)
    plain.load_state_dict(by_hand(tmp_path / "out"), strict=False)

    def round_inputs(module: torch.nn.Module, inputs: tuple[Tensor]) -> Tensor:
        scale = inputs[0].abs().amax(-1, keepdim=True) / 127.5
        return (inputs[0] / scale).round().clamp(-128, 127) * scale

    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(round_inputs)
    theirs = in_transformers(tmp_path / "out")
    found = their_logits(theirs)
    torch.testing.assert_close(found, their_logits(plain), atol=2e-3, rtol=1e-3)
    assert not torch.allclose(found, their_logits(in_transformers(storyteller.PATH)), atol=2e-3, rtol=1e-3)
    x = torch.randn(300, theirs.config.intermediate_size)
    x[:, 0] = -1.1 * x.abs().amax(1)  # halfway between two codes: by another rule, a quarter of them would differ
    with torch.no_grad():
        expected = theirs.model.layers[0].mlp.down_proj(x[None])[0]
    for ops in (TORCH_OPS, C_OPS):
        decoder = load_decoder(tmp_path / "out", torch.float32, ops=ops)
        torch.testing.assert_close(decoder.layers[0].mlp.down(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [["--scheme", "w8a8", "--method", "smoothquant"], ["--method", "gptq"]])
def test_the_command_writes_a_model_that_still_knows_its_stories(options: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["quantize", "storyteller", str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    assert "2,801,664 weights in" in result.output
    assert "339,840 other parameters are not quantised; the head is tied to the embedding" in result.output
    names = {file.name for file in tmp_path.joinpath("out").iterdir()}
    assert names == {file.name for file in storyteller.PATH.iterdir() if file.is_file()}
    llm = LLM(tmp_path / "out")
    prompt, answer = storyteller.evaluation.quizzes(storyteller.tell(1_000_000_000))[0]
    output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=24, stop=["\n"]), use_tqdm=False)[0]
    assert output.outputs[0].text.strip() == answer


def test_scales_are_folded_into_norms_that_keep_their_precision(tmp_path: Path) -> None:
    quantize("storyteller", tmp_path / "out", scheme="w8a8", method="smoothquant")
    stored, source = load_file(tmp_path / "out/model.safetensors"), load_file(storyteller.PATH / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    assert stored[norm].dtype == torch.float32 and not torch.equal(stored[norm], source[norm].float())
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert stored[name].dtype == source[name].dtype and torch.equal(stored[name], source[name])


def test_transformers_reads_a_folder_whose_most_sensitive_layers_are_not_quantised(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("paged_infer.quantize.NUM_SENSITIVITY_TEXTS", 1)
    steps = []
    options = {"group_size": 64, "keep_wide": 0.1}
    report = quantize(
        "storyteller", tmp_path / "out", **options, on_start=steps.append, on_layer=lambda: steps.append(1)
    )
    assert "layers.0.attention.qkv" in report.wide and steps == [30] + [1] * 30  # 6 layers, 24 linear layers
    assert 0.9 * 2_801_664 <= report.num_quantised < 2_801_664
    stored, source = load_file(tmp_path / "out/model.safetensors"), load_file(storyteller.PATH / "model.safetensors")
    for part in "qkv":
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        assert torch.equal(stored[name], source[name])
    plain = in_transformers(storyteller.PATH)
    plain.load_state_dict(by_hand(tmp_path / "out"), strict=False)
    assert torch.equal(their_logits(in_transformers(tmp_path / "out")), their_logits(plain))


def test_an_untied_head_stays_and_is_named(checkpoint, tmp_path: Path) -> None:
    report = quantize(str(checkpoint("llama2")), tmp_path / "out", scheme="w8a16")
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert section["ignore"] == ["lm_head"] and section["format"] == "pack-quantized" and not report.is_tied
    assert "lm_head.weight" in load_file(tmp_path / "out/model.safetensors")


def test_the_seed_draws_the_texts(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(story.text for story in map(storyteller.tell, range(80))))
    for source in ("stories", str(file)):
        first, again, other = (calibration_texts(storyteller.PATH, source, seed) for seed in (0, 0, 1))
        assert first == again != other and len(first) == 24
    file.write_text(WORDS)
    assert sum(map(len, calibration_texts(storyteller.PATH, str(file), 0))) > 500


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"scheme": "w2a16"}, "scheme='w2a16': must be one of w4a16, w8a16, w8a8"),
        ({"method": "best"}, "method='best': must be one of rtn"),
        ({"group_size": 40}, r"group_size=40: does not divide the 192 columns of layers\.0\.attention\.qkv; 32 or 48"),
        ({"scheme": "w8a8", "group_size": 32}, "group_size=32: 'w8a8' takes none: one scale per row"),
        ({"keep_wide": 1.0}, "keep_wide=1.0: must be >= 0 and < 1"),
        ({"keep_wide": -0.1}, "keep_wide=-0.1: must be >= 0"),
        ({"calibration": "stories"}, "calibration='stories': method 'rtn' uses no text"),
        ({"method": "gptq", "seed": -1}, "seed=-1: must be 0 to 39583332"),
        ({"method": "gptq", "seed": 39583333}, "seed=39583333: must be 0 to 39583332"),
        ({"method": "gptq", "calibration": "{tmp}/none.txt"}, "none.txt': cannot be read as text"),
        ({"method": "gptq", "calibration": "{tmp}/blank.txt"}, "blank.txt': has no text"),
        ({"method": "gptq", "calibration": "{tmp}/bytes.bin"}, "bytes.bin': cannot be read as text"),
        ({"out": "."}, "exists already"),
        ({"model": "mixtral", "method": "smoothquant", "scheme": "w8a8"}, "mixture of experts"),
        ({"model": "gpt-oss"}, "gpt_oss cannot be quantised: it stores all experts as one tensor"),
        ({"model": "gpt2"}, "gpt2 cannot be quantised"),
        ({"model": "qwen3", "method": "gptq"}, "this model needs a text file"),
        ({"model": "qwen3", "method": "gptq", "calibration": "stories"}, "has no tokenizer"),
    ],
)
def test_invalid_options_are_refused_and_nothing_is_written(options, problem, checkpoint, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xfe\x00\x80")
    before = sorted(tmp_path.iterdir())
    options = {k: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v for k, v in options.items()}
    family = options.pop("model", None)
    out = tmp_path / options.pop("out", "out")
    with pytest.raises(ValueError, match=problem):
        quantize(str(checkpoint(family)) if family else "storyteller", out, **options)
    assert sorted(tmp_path.iterdir()) == before


def test_a_quantised_model_is_not_quantised_again_and_the_command_says_so_in_a_line(tmp_path: Path) -> None:
    quantize("storyteller", tmp_path / "out")
    result = CliRunner().invoke(app, ["quantize", str(tmp_path / "out"), str(tmp_path / "again")])
    assert result.exit_code == 2 and not (tmp_path / "again").exists()
    assert result.output == "error: the checkpoint is quantised already, by 'compressed-tensors'\n"
