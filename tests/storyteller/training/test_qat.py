"""Quantisation-aware training lowers the loss, and its folder has the codes that it trained with."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import Qwen3ForCausalLM
from typer import BadParameter

from paged_infer import LLM, SamplingParams
from paged_infer.model.loading.load import load_decoder
from paged_infer.model.quant.calibration import log_probs
from paged_infer.model.quant.scheme import Scheme, rounded
from paged_infer.storyteller import PATH, evaluate, evaluation, tell
from paged_infer.storyteller.training import qat, train
from paged_infer.storyteller.training.batches import Mix, Rows, stream
from paged_infer.storyteller.training.distil import distance_from
from paged_infer.storyteller.training.export import export

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
INT2 = Scheme(2, False, "group", 32)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(PATH / "tokenizer.json"))


def small_model(tokenizer, seed: int = 0):
    return train.new_model(tokenizer.get_vocab_size(), seed, SHAPE | {"intermediate_size": 64})


def linears(model):
    return {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and name != "lm_head"}


def test_all_linear_layers_but_the_head_compute_with_rounded_weights(tokenizer):
    plain = small_model(tokenizer)
    model = qat.fake_quantised(small_model(tokenizer), INT2)
    exact = linears(plain)
    assert len(exact) == 7 and torch.equal(model.lm_head.weight, plain.lm_head.weight)
    for name, linear in linears(model).items():
        assert torch.equal(linear.weight, rounded(exact[name].weight, INT2))
    assert qat.masters(model).keys() == plain.state_dict().keys()


def test_ten_steps_bring_an_int2_model_nearer_to_its_float_model(tokenizer, tmp_path):
    [batch] = stream(Rows(tokenizer, seed=3), [(1, Mix(drills=0.5))], tokens=300)
    teacher = small_model(tokenizer)
    model = qat.fake_quantised(small_model(tokenizer), INT2)
    loss_of = distance_from(teacher)
    before, _ = loss_of(model, batch)
    phases = [(10, Mix(drills=0.5))]
    train.fit(model, tokenizer, phases, tmp_path / "m", 0, 300, 5, 10, loss_of, save=lambda *_: None)
    after, _ = loss_of(model, batch)
    assert after < 0.8 * before
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("scheme", [INT2, Scheme(3, True, "group", 16), Scheme(4, False, "group", 16)])
def test_the_folder_has_the_codes_that_training_computed_with(scheme, tokenizer, tmp_path):
    model = qat.fake_quantised(small_model(tokenizer), scheme)
    qat.export_quantised(model, tokenizer, tmp_path / "m", scheme)
    config = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]
    assert (
        config["format"] == "pack-quantized"
        and config["config_groups"]["group_0"]["weights"]["num_bits"] == scheme.bits
    )
    names = load_file(tmp_path / "m/model.safetensors")
    assert ("model.layers.0.mlp.up_proj.weight_zero_point" in names) is not scheme.symmetric
    text = tokenizer.encode(evaluation.document(tell(1))).ids
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.bfloat16().float()
    with torch.no_grad():
        theirs = model(torch.tensor([text])).logits[0].log_softmax(-1)
    torch.testing.assert_close(
        log_probs(load_decoder(tmp_path / "m", torch.float32), text), theirs, atol=1e-3, rtol=1e-3
    )


def test_one_command_trains_compares_and_writes_a_folder_that_the_engine_loads(tokenizer, tmp_path, monkeypatch):
    export(small_model(tokenizer), tokenizer, tmp_path / "float")
    monkeypatch.setattr(qat, "PATH", tmp_path / "float")
    monkeypatch.setattr(qat, "NUM_CALIBRATION", 2)
    options = {"steps": 2, "batch_tokens": 300, "threads": torch.get_num_threads(), "stories": 2}
    qat.main(tmp_path / "out", scheme="w3a16", figures=tmp_path, **options)
    text = (tmp_path / "storyteller_qat_w3a16.json").read_text()
    found = json.loads(text)["methods"]
    assert list(found) == ["float", "rtn", "awq", "gptq", "qat"] and str(tmp_path) not in text
    assert found["float"]["kl"] == 0 < found["gptq"]["kl"] < found["rtn"]["kl"]
    [output] = LLM(tmp_path / "out").generate("Once", SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3
    with pytest.raises(BadParameter, match="exists already"):
        qat.main(tmp_path / "out")


def test_perplexity_and_recall_are_those_of_evaluate_which_generates(tokenizer, tmp_path):
    """On a model that is often wrong: int2 without training."""
    model = qat.fake_quantised(
        Qwen3ForCausalLM.from_pretrained(PATH, dtype=torch.float32), Scheme(2, True, "group", 64)
    )
    qat.export_quantised(model, tokenizer, tmp_path / "m", Scheme(2, True, "group", 64))
    judge = qat.Judge(qat.dense_decoder(PATH), tokenizer, 6)
    quality = judge.quality(load_decoder(tmp_path / "m", torch.float32))
    found = evaluate(LLM(tmp_path / "m"), 6)
    assert quality.perplexity == pytest.approx(found["perplexity"], rel=1e-3)
    assert 0.3 < quality.recall == found["recall"] < 1 and quality.kl > 0.1 and quality.same_top < 0.99


@pytest.mark.parametrize(
    ("scheme", "size", "problem"),
    [("w5a16", 32, "scheme='w5a16': must be one of w2a16, w3a16, w4a16"), ("w2a16", 0, "group_size=0")],
)
def test_schemes_are_refused_by_name(scheme, size, problem):
    with pytest.raises(ValueError, match=problem):
        qat.scheme_of(scheme, size)


def test_a_group_size_that_does_not_divide_is_refused_before_training(tokenizer):
    with pytest.raises(
        ValueError, match=r"group_size=24: does not divide the 32 columns of model\.layers\.0\.self_attn"
    ):
        qat.fake_quantised(small_model(tokenizer), Scheme(2, True, "group", 24))
