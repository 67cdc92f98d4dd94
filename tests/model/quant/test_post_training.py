"""Post-training quantisation of a decoder: calibration, the methods' order in KL, and layers left unquantised."""

from __future__ import annotations

import pytest
import torch
from decoding import IDS, logits
from tokenizers import Tokenizer

from paged_infer import storyteller
from paged_infer.kernels.quant.weight import dequantise
from paged_infer.model.decoder import Decoder
from paged_infer.model.linear import DENSE
from paged_infer.model.loading.load import load_decoder
from paged_infer.model.quant.calibration import calibrated_layers, divergence, log_probs, packed_step
from paged_infer.model.quant.post_training import METHODS, quantise_decoder
from paged_infer.model.quant.scheme import Scheme, quantise
from paged_infer.model.quant.sensitivity import sensitivities, stay_wide
from paged_infer.storyteller.evaluation import document
from paged_infer.storyteller.stories.grammar import FIRST_EVALUATION_SEED, tell

INT3 = Scheme(3, False, "group", 32)


def dense(folder=storyteller.PATH) -> Decoder:
    return load_decoder(folder, torch.float32, method_of=lambda name: DENSE)


def stories(first: int, count: int) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(storyteller.PATH / "tokenizer.json"))
    return [tokenizer.encode(document(tell(first + i)), add_special_tokens=False).ids for i in range(count)]


CALIBRATION, UNSEEN = stories(50_000_000, 2), stories(FIRST_EVALUATION_SEED, 2)


def kl(decoder: Decoder, texts=UNSEEN) -> float:
    exact = dense()
    rows = [divergence(log_probs(exact, text), log_probs(decoder, text)) for text in texts]
    return torch.cat(rows).mean().item()


def test_gptq_diverges_less_than_awq_and_awq_less_than_round_to_nearest_at_3_bits() -> None:
    """On two samples together. On four samples, the KL of rounding to nearest was 1.06 to 1.98 times AWQ's, and AWQ's
    was 1.25 to 1.66 times GPTQ's; with two calibration stories instead of four, AWQ was better than GPTQ once in four.
    """
    exact, found = dense(), dict.fromkeys(("rtn", "awq", "gptq"), 0.0)
    for sample in range(2):
        texts = stories(50_000_000 + 100 * sample, 4)
        unseen = stories(FIRST_EVALUATION_SEED + 100 * sample, 4)
        expected = [log_probs(exact, text) for text in unseen]
        for method in found:
            decoder = dense()
            quantise_decoder(decoder, INT3, method, texts)
            rows = [divergence(log, log_probs(decoder, text)) for log, text in zip(expected, unseen, strict=True)]
            found[method] += torch.cat(rows).mean().item()
    assert found["rtn"] > found["awq"] > 1.1 * found["gptq"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_decoder_has_its_dequantised_matrices(method: str, checkpoint) -> None:
    decoder, done = dense(checkpoint("qwen3")), []
    scheme, wide = Scheme(4, True, "group", 16), "layers.1.mlp.up"
    before = {name: linear.weight.clone() for name, linear in decoder.linears()}
    found = quantise_decoder(decoder, scheme, method, [IDS], wide=[wide], on_layer=lambda: done.append(1))
    linears = dict(decoder.linears())
    assert found.keys() == linears.keys() - {wide} and len(done) == len(decoder.layers)
    for name, weight in found.items():
        assert torch.equal(dequantise(weight), linears[name].weight) and weight.bits == 4
    if method in ("rtn", "gptq"):
        assert torch.equal(linears[wide].weight, before[wide])
    if method == "rtn":
        assert all(torch.equal(dequantise(quantise(before[name], scheme)), linears[name].weight) for name in found)


def test_a_layer_is_calibrated_on_what_the_changed_layers_before_it_give(checkpoint) -> None:
    decoder, seen = dense(checkpoint("gemma3")), []
    for index, layer in enumerate(calibrated_layers(decoder, [IDS, IDS[:5]])):
        (name, *_) = layer.linears
        layer.linears[name].weight.data.mul_(1 + 0.1 * index)
        seen.append(layer.moments(name)[name])
    inputs = {}
    for name, linear in decoder.linears():
        linear.register_forward_pre_hook(lambda module, x, name=name: inputs.setdefault(name, x[0]))
    logits(decoder, IDS)
    for index, moments in enumerate(seen):
        whole = torch.cat([inputs[f"layers.{index}.attention.qkv"], inputs[f"layers.{index}.attention.qkv"][:5]])
        torch.testing.assert_close(moments.products, whole.t() @ whole, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(moments.mean, whole.abs().mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments.largest, whole.abs().amax(0), rtol=1e-4, atol=1e-4)


def test_log_probs_are_those_of_the_decoder(checkpoint) -> None:
    decoder = dense(checkpoint("llama2"))
    torch.testing.assert_close(log_probs(decoder, IDS), logits(decoder, IDS).log_softmax(-1))
    assert divergence(log_probs(decoder, IDS), log_probs(decoder, IDS)).abs().max() == 0


def most_sensitive(measured: dict[str, float]) -> set[str]:
    return set(sorted(measured, key=lambda name: measured[name])[-5:])


def test_leaving_the_most_sensitive_layers_unquantised_helps() -> None:
    decoder, scheme = dense(), Scheme(2, False, "group", 32)
    measured = sensitivities(decoder, scheme, CALIBRATION[:1])
    assert kl(decoder) == 0  # each layer has its own weights again
    again = sensitivities(decoder, scheme, CALIBRATION[1:])  # on another text
    assert most_sensitive(measured) == most_sensitive(again)
    wide = stay_wide(decoder, measured, share=0.2)
    sizes = {name: linear.weight.numel() for name, linear in decoder.linears()}
    assert 0 < sum(sizes[name] for name in wide) <= 0.2 * sum(sizes.values())
    assert stay_wide(decoder, measured, share=0.0) == [] and len(stay_wide(decoder, measured, share=1.0)) == len(sizes)
    quantise_decoder(decoder, scheme, wide=wide)
    all_narrow = dense()
    quantise_decoder(all_narrow, scheme)
    assert kl(decoder) < 0.5 * kl(all_narrow)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"method": "omniquant"}, "method='omniquant': must be one of rtn, gptq, awq, smoothquant"),
        ({"method": "gptq", "texts": ()}, "method='gptq': needs texts"),
        ({"method": "awq", "texts": [[1], []]}, "an empty text"),
        ({"wide": ["layers.0.mlp.gate"]}, "wide: 'layers.0.mlp.gate' is not a linear layer that is quantised"),
        ({"scheme": Scheme(4, True, "group", 40)}, "group_size=40: does not divide the 192 columns of layers.0"),
    ],
)
def test_invalid_options_are_refused_and_change_nothing(options: dict[str, object], problem: str, checkpoint) -> None:
    decoder = dense(checkpoint("qwen3"))
    before = logits(decoder, IDS)
    with pytest.raises(ValueError, match=problem):
        quantise_decoder(decoder, **{"scheme": Scheme(8), "texts": [IDS], **options})
    assert torch.equal(logits(decoder, IDS), before)


@pytest.mark.parametrize("family", ["qwen2-moe", "gpt-oss"])
def test_gptq_rounds_each_expert_by_the_tokens_that_chose_it(family: str, checkpoint, caplog) -> None:
    """An expert that no token chose is rounded to nearest, with a warning: dead inputs would make its weights zero."""
    decoder, exact, scheme = dense(checkpoint(family)), dense(checkpoint(family)), Scheme(4)
    text = [[5, 900, 17, 2]]  # so few that some experts get no token
    found, layer = quantise_decoder(decoder, scheme, "gptq", text), 1
    chosen = dict[str, torch.Tensor]()
    experts = decoder.layers[layer].mlp.experts
    experts.register_forward_pre_hook(lambda module, inputs: chosen.update(x=inputs[0], ids=inputs[1]))
    logits(decoder, text[0])
    name = f"layers.{layer}.mlp.experts.up"
    before, after = dict(exact.linears())[name].weight, dequantise(found[name])
    assert torch.equal(dict(decoder.linears())[name].weight, after)
    unseen = 0
    for expert, (was, now) in enumerate(zip(*(w.chunk(experts.moe.num_experts) for w in (before, after)), strict=True)):
        x = chosen["x"][(chosen["ids"] == expert).any(1)]
        nearest = dequantise(quantise(was, scheme))
        if len(x) == 0:
            assert torch.equal(now, nearest)
            unseen += 1
        else:
            assert (x @ (now - was).t()).norm() < 0.9 * (x @ (nearest - was).t()).norm()
    assert unseen > 0 and f"{name}: no text reaches {unseen} of {experts.moe.num_experts} experts" in caplog.text
    narrow = {one for one, _ in decoder.linears() if not one.endswith(("router.gate", "shared_gate"))}
    assert found.keys() == narrow


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_a_method_that_scales_inputs_is_refused_for_experts(method: str, checkpoint) -> None:
    expected = rf"method='{method}': not for a mixture of experts, .*; use 'rtn' or 'gptq'"
    with pytest.raises(ValueError, match=expected):
        quantise_decoder(dense(checkpoint("mixtral")), Scheme(8), method, [IDS])


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
def test_inputs_that_are_not_finite_are_named_by_every_method(method: str, checkpoint) -> None:
    """Otherwise AWQ would silently round to nearest, because no error is less than infinity."""
    decoder = dense(checkpoint("qwen3"))
    decoder.layers[0].mlp_norm.weight.data[3] = 1e30
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up: its inputs have values that are infinite or NaN"):
        quantise_decoder(decoder, Scheme(8), method, [IDS])


def test_weights_that_are_not_finite_are_refused(checkpoint) -> None:
    decoder = dense(checkpoint("qwen3"))
    decoder.layers[1].mlp.down.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down: has values that are infinite"):
        quantise_decoder(decoder, Scheme(8))
    with pytest.raises(ValueError, match="no text"):
        packed_step([])
