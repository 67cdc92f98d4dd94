"""All layers by one call of C: the bits of the layers computed one by one, and whatever was changed in one is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from paged_infer import LLM, SamplingParams
from paged_infer.kernels.cpu.build import unavailable_reason

if unavailable_reason() is not None:
    pytest.skip("no C compiler", allow_module_level=True)

USUAL = ["llama2", "llama3", "llama-biased", "mistral", "qwen2", "qwen2-window", "qwen3", "phi3"]
PROMPTS = [[*range(3, 3 + n)] for n in (1, 2, 9, 40, 70)]
PARAMS = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True, logprobs=2)


def results(llm: LLM) -> list[Any]:
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [(one.outputs[0].token_ids, one.outputs[0].logprobs) for one in outputs]


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The number of tokens of each call."""
    from paged_infer.kernels.cpu.layers import LayersInC

    seen: list[int] = []
    call = LayersInC.__call__

    def counted(self: LayersInC, x: torch.Tensor, *rest: Any) -> Any:
        seen.append(len(x))
        return call(self, x, *rest)

    monkeypatch.setattr(LayersInC, "__call__", counted)
    return seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", USUAL)
def test_one_call_gives_the_bits_of_the_layers_one_by_one(make_llm, name, dtype, calls) -> None:
    """With prompts in chunks beside decodes; rows of 272 numbers, which bfloat16 has to pad, are left to the layers."""
    llm = make_llm(name, dtype=dtype, max_num_batched_tokens=32, enable_prefix_caching=False)
    whole = results(llm)
    assert bool(calls) == (llm.engine.decoder.whole_layers is not None)
    assert calls or dtype == "bfloat16"
    llm.engine.decoder.whole_layers = None
    calls.clear()
    assert results(llm) == whole and not calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_quantised_products_are_part_of_the_call(make_llm, scheme, dtype, calls) -> None:
    llm = make_llm("llama2", dtype=dtype, quantization=scheme, max_num_batched_tokens=32, enable_prefix_caching=False)
    whole = results(llm)
    assert calls
    llm.engine.decoder.whole_layers = None
    assert results(llm) == whole


@pytest.mark.parametrize(("kind", "dtype"), [("int8", "float32"), ("fp8", "bfloat16"), ("fp8_e5m2", "float32")])
def test_a_cache_of_8_bits_is_part_of_the_call(make_llm, kind, dtype, calls) -> None:
    sizes = {"max_num_batched_tokens": 32, "enable_prefix_caching": False}
    sizes |= {"quantization": "w8a16"} if dtype == "bfloat16" else {}  # whose dense rows would need padding
    llm = make_llm("llama2", dtype=dtype, kv_cache_dtype=kind, **sizes)
    whole = results(llm)
    assert calls
    llm.engine.decoder.whole_layers = None
    calls.clear()
    assert results(llm) == whole and not calls
    assert results(make_llm("llama2", dtype=dtype, **sizes)) != whole


@pytest.mark.parametrize("name", ["gpt2", "olmo2", "gemma2", "mixtral", "deepseek2", "smollm3", "granite"])
def test_other_decoders_compute_their_layers_one_by_one(make_llm, name) -> None:
    assert make_llm(name).engine.decoder.whole_layers is None


def test_a_hook_a_part_and_a_forward_that_were_changed_are_seen(make_llm, calls) -> None:
    llm = make_llm("qwen3", enable_prefix_caching=False)
    want, layer, heard = results(llm), llm.engine.decoder.layers[1], list[int]()
    calls.clear()
    handle = layer.mlp.register_forward_hook(lambda *one: heard.append(1))
    assert results(llm) == want and heard and not calls
    handle.remove()
    mlp = layer.mlp
    layer.mlp = nn.Sequential(mlp)
    assert results(llm) == want and not calls
    layer.mlp = mlp
    layer.mlp.forward = lambda x: torch.zeros_like(x)
    assert results(llm) != want and not calls
    del layer.mlp.forward
    assert results(llm) == want and calls
    llm.engine.decoder.layers.append(Idle())
    calls.clear()
    assert results(llm) == want and not calls


class Idle(nn.Module):
    """A layer that changes nothing."""

    rope_index = None

    def forward(self, x: torch.Tensor, residual: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
        return x, residual


def test_hooks_of_all_modules_are_seen(make_llm, calls) -> None:
    from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

    llm = make_llm("qwen3", enable_prefix_caching=False)
    want = results(llm)
    for register in (register_module_forward_hook, register_module_forward_pre_hook):
        heard = set[str]()
        handle = register(lambda module, *rest, heard=heard: heard.add(type(module).__name__))
        calls.clear()
        try:
            assert results(llm) == want and not calls and {"DecoderLayer", "Attention", "MLP"} <= heard
        finally:
            handle.remove()
        assert results(llm) == want and calls


@pytest.mark.parametrize("change", ["parameter", "data", "product", "method", "class"])
def test_what_was_replaced_after_loading_is_seen(change, make_llm, calls, monkeypatch) -> None:
    llm = make_llm("qwen3", enable_prefix_caching=False)
    want, layer = results(llm), llm.engine.decoder.layers[1]
    calls.clear()
    if change == "parameter":
        layer.mlp_norm.weight = nn.Parameter(layer.mlp_norm.weight * 2, requires_grad=False)
    elif change == "data":
        layer.attention.qk_norm_weight.data = layer.attention.qk_norm_weight.data * 2
    elif change == "product":
        product = layer.mlp.down.product
        layer.mlp.down.product = lambda x: 2 * product(x)
    elif change == "method":
        layer.mlp.down.method = type("Doubled", (), {"apply": lambda self, linear, x: 2 * linear.product(x)})()
    else:
        forward = type(layer.mlp).forward
        monkeypatch.setattr(type(layer.mlp), "forward", lambda self, x: 2 * forward(self, x))
    assert results(llm) != want and not calls


@pytest.mark.parametrize("change", ["method", "class", "ops"])
def test_a_cache_that_was_changed_is_seen(change, make_llm, calls, monkeypatch) -> None:
    kind = "int8" if change == "ops" else "auto"  # other keys are stored as they are rotated
    llm, heard = make_llm("qwen3", kv_cache_dtype=kind, enable_prefix_caching=False), list[int]()
    want, cache = results(llm), llm.engine.executor.runner.cache
    calls.clear()

    def spied(function: Any) -> Any:
        return lambda *args, **options: heard.append(1) or function(*args, **options)

    if change == "method":
        cache.attend_stored = spied(cache.attend_stored)
    elif change == "class":
        monkeypatch.setattr(type(cache), "attend_stored", spied(type(cache).attend_stored))
    else:
        cache.ops = cache.ops._replace(store_kv=spied(cache.ops.store_kv))
    assert results(llm) == want and heard and not calls


def test_a_tied_table_is_held_once(make_llm) -> None:
    decoder, ids = make_llm("qwen3").engine.decoder, torch.tensor([0, 5, 1002])
    assert decoder.head.product.panels.data_ptr() == decoder.embedding.panels.data_ptr()
    assert torch.equal(decoder.embedding(ids), decoder.head.weight[ids])
    assert torch.equal(decoder.embedding.weight, decoder.head.weight)
    assert [name for name, _ in decoder.named_parameters() if not name.startswith("layers.")] == [
        "embedding.panels",
        "final_norm.weight",
    ]
