"""Attention backends by name, a user's own among them, and the elementwise operations that go with each."""

from __future__ import annotations

import json

import pytest
import torch

from paged_infer import LLM, SamplingParams
from paged_infer.baselines import generate_naive
from paged_infer.kernels import attention_backends, triton_runtime
from paged_infer.kernels.attention_backends import (
    ATTENTION_BACKENDS,
    attention_backend,
    check_options,
    register_attention_backend,
)
from paged_infer.kernels.op_sets import C_OPS, SDPA_OPS, TORCH_OPS, TRITON_OPS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'flash9': must be one of auto, c, sdpa, .*torch, triton, module:function"):
        attention_backend("flash9", CPU)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:attend", "No module named 'no_such_module'"),
        ("math:attend", "module 'math' has no attribute 'attend'"),
        ("math:pi", "is not a function but a float"),
        (":attend", "cannot be imported"),
        (".relative:attend", "cannot be imported"),
    ],
)
def test_a_backend_that_cannot_be_imported_is_refused_with_the_reason(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_backend(name, CPU)


def test_auto_is_the_fastest_that_the_device_has(monkeypatch) -> None:
    monkeypatch.setattr(attention_backends, "unavailable_reason", lambda: None)
    assert attention_backend("auto", CPU) == (ATTENTION_BACKENDS["c"], C_OPS)
    monkeypatch.setattr(attention_backends, "unavailable_reason", lambda: "no C compiler")
    assert attention_backend("auto", CPU) == (ATTENTION_BACKENDS["sdpa"], SDPA_OPS)
    assert attention_backend("auto", CUDA)[1] is SDPA_OPS  # an interpreting process cannot compile
    monkeypatch.setattr(attention_backends, "can_run_on", lambda device: True)
    assert attention_backend("auto", CUDA) == (ATTENTION_BACKENDS["triton"], TRITON_OPS)


def test_triton_is_refused_where_it_cannot_run(monkeypatch) -> None:
    monkeypatch.setattr(triton_runtime, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="attention_backend='triton' cannot run on cpu here"):
        attention_backend("triton", CPU)


def test_c_is_refused_where_it_cannot_run(monkeypatch) -> None:
    with pytest.raises(ValueError, match="attention_backend='c' cannot run on cuda here: it is for CPUs"):
        attention_backend("c", CUDA)
    monkeypatch.setattr(attention_backends, "unavailable_reason", lambda: "cc failed: no room")
    with pytest.raises(ValueError, match="'c' cannot run on cpu here: cc failed: no room"):
        attention_backend("c", CPU)


def test_with_the_torch_backends_everything_is_torch_and_with_triton_everything_is_triton() -> None:
    assert attention_backend("torch", CPU)[1] is TORCH_OPS
    assert attention_backend("sdpa", CPU)[1] is SDPA_OPS
    assert attention_backend("triton", CPU)[1] is TRITON_OPS


def test_a_registered_function_runs_the_engine(make_llm, monkeypatch) -> None:
    monkeypatch.setattr(attention_backends, "ATTENTION_BACKENDS", dict(ATTENTION_BACKENDS))
    calls = []

    @register_attention_backend("mine")
    def mine(q, k_cache, v_cache, step, *, window):
        calls.append(q.shape)
        return attention_backends.torch_backend(q, k_cache, v_cache, step, window=window)

    params = SamplingParams(temperature=0, max_tokens=5)
    theirs = make_llm(attention_backend="torch").generate([3, 1, 4], params, use_tqdm=False)
    ours = make_llm(attention_backend="mine").generate([3, 1, 4], params, use_tqdm=False)
    assert calls and ours[0].outputs[0].token_ids == theirs[0].outputs[0].token_ids


def test_a_function_in_a_file_of_the_current_folder_can_be_named(make_llm, tmp_path, monkeypatch) -> None:
    (tmp_path / "my_kernel_7.py").write_text(
        "import torch\n\ndef attend(q, k_cache, v_cache, step, *, window):\n    return torch.zeros_like(q)\n"
    )
    monkeypatch.chdir(tmp_path)
    llm = make_llm(attention_backend="my_kernel_7:attend")
    assert len(llm.generate([3, 1, 4], SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0].token_ids) == 2


def test_a_backend_without_an_option_that_the_model_needs_is_refused_by_name() -> None:
    def plain(q, k_cache, v_cache, step, *, window): ...

    def scaled(q, k_cache, v_cache, step, *, window, scale=None): ...

    def all_of_them(q, k_cache, v_cache, step, *, window, **scores): ...

    class Callable:
        def __call__(self, q, k_cache, v_cache, step, *, window): ...

    options = {"scale": 0.1, "softcap": 50.0}
    for backend in (*ATTENTION_BACKENDS.values(), all_of_them):
        check_options(backend, options)
    for backend in (plain, scaled):
        check_options(backend, {})
    with pytest.raises(ValueError, match=r"_backends:.*plain takes no scale and no softcap, which this model needs"):
        check_options(plain, options)
    with pytest.raises(ValueError, match=r"_backends:.*scaled takes no softcap, which"):
        check_options(scaled, options)
    with pytest.raises(ValueError, match=r"_backends:.*Callable takes no sinks, which"):
        check_options(Callable(), ["sinks"])


def test_an_engine_whose_model_needs_more_than_its_backend_takes_is_not_built(checkpoint, monkeypatch) -> None:
    def plain(q, k_cache, v_cache, step, *, window): ...

    monkeypatch.setattr(attention_backends, "ATTENTION_BACKENDS", {**ATTENTION_BACKENDS, "plain": plain})
    with pytest.raises(ValueError, match="plain takes no scale and no softcap, which this model needs"):
        LLM(checkpoint("gemma2"), attention_backend="plain")


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_heads_larger_than_the_kernels_take_run_on_every_backend(model_type, tmp_path, caplog) -> None:
    sizes = {"hidden_size": 40, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 258, "vocab_size": 97}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **sizes, **heads}))
    prompts, params = [list(range(2, 20)), [5, 6, 7]], SamplingParams(temperature=0, max_tokens=3)
    said = []
    for name in ("torch", "sdpa", "c", "triton"):
        llm = LLM(tmp_path, load_format="dummy", attention_backend=name, num_blocks=8)
        said.append([output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)])
    said.append([output.outputs[0].token_ids for output in generate_naive(llm, prompts, params)])
    assert said == [said[0]] * 5
    assert [m for m in caplog.messages if "up to 256, so 'sdpa' computes the attention" in m] == caplog.messages
