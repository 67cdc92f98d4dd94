"""A GGUF file runs as the transformers checkpoint that it was converted from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import LLAMA3_ROPE, MODELS, VOCAB, encoded, random_model, save_gguf
from transformers import AutoConfig

from paged_infer import LLM, SamplingParams
from paged_infer.baselines import generate_cached, generate_naive, generate_static
from paged_infer.model.families import FAMILIES
from paged_infer.model.loading.checkpoint import config_dict, list_tensors, read_config
from paged_infer.model.loading.gguf_file import TENSOR_TYPES, read_gguf
from paged_infer.model.loading.gguf_model import MODEL_TYPES
from paged_infer.model.loading.load import load_decoder, saved_dtype

LENGTHS = (1, 5, 17, 30)
NUM_NEW = 12
RUNS = [name for name in MODELS if MODEL_TYPES[MODELS[name][0].removesuffix("_text")] in FAMILIES]
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(2, VOCAB, length).tolist() for length in LENGTHS]


def greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def tokens(outputs: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


class TestTokens:
    @pytest.mark.parametrize("name", RUNS)
    def test_every_baseline_gives_transformers_greedy_tokens(self, name: str, tmp_path: Path) -> None:
        model = save_gguf(tmp_path / "model.gguf", random_model(name))
        llm = LLM(tmp_path / "model.gguf", num_blocks=32, device="cpu")
        expected = [greedy(model, prompt) for prompt in prompts()]
        assert tokens(llm.generate(prompts(), GREEDY, use_tqdm=False)) == expected
        for generate in (generate_naive, generate_cached, generate_static):
            assert tokens(generate(llm, prompts(), GREEDY)) == expected

    @pytest.mark.parametrize("tensor_type", TENSOR_TYPES)
    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_of_each_tensor_type_the_tokens_are_those_of_the_dequantised_weights(
        self, name: str, tensor_type: str, tmp_path: Path
    ) -> None:
        model = save_gguf(tmp_path / "model.gguf", random_model(name), tensor_type)
        llm = LLM(tmp_path / "model.gguf", num_blocks=32, device="cpu")
        assert tokens(llm.generate(prompts(), GREEDY, use_tqdm=False)) == [greedy(model, p) for p in prompts()]

    def test_a_draft_model_may_be_a_gguf_file(self, tmp_path: Path) -> None:
        save_gguf(tmp_path / "model.gguf", random_model("qwen3"))
        path = str(tmp_path / "model.gguf")
        speculation = {"method": "draft_model", "model": path, "num_speculative_tokens": 3}
        plain, drafting = LLM(path, num_blocks=32), LLM(path, num_blocks=32, speculative_config=speculation)
        expected = tokens(plain.generate(prompts(), GREEDY, use_tqdm=False))
        assert tokens(drafting.generate(prompts(), GREEDY, use_tqdm=False)) == expected


class TestRope:
    @pytest.mark.parametrize(
        "changes",
        [
            {"llama__rope__scaling__type": None},
            {
                "llama__rope__scaling__type": None,
                "llama__rope__scaling__factor": None,
                "llama__rope__scale_linear": 4.0,
            },
        ],
        ids=["no-type", "old-key"],
    )
    def test_a_factor_without_a_type_is_linear_as_in_llama_cpp(self, changes: dict[str, Any], tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        save_gguf(path, random_model("llama-linear"), **changes)
        assert {rope.linear_factor for rope in read_config(path).ropes} == {4.0}


class TestTensors:
    @pytest.mark.parametrize("name", MODELS)
    def test_names_shapes_and_values_are_those_of_the_transformers_checkpoint(self, name: str, tmp_path: Path) -> None:
        model = save_gguf(tmp_path / "model.gguf", random_model(name), "Q8_0")
        expected = model.state_dict()
        if model.config.tie_word_embeddings:
            del expected["lm_head.weight"]
        found = {tensor.name: tensor for tensor in list_tensors(tmp_path / "model.gguf")}
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert found[key].shape == tuple(tensor.shape)
            assert torch.equal(found[key].read().float(), tensor), key

    @pytest.mark.parametrize("tensor_type", TENSOR_TYPES)
    def test_a_matrix_of_many_rows_is_dequantised_as_the_library_does(self, tensor_type: str, tmp_path: Path) -> None:
        raw = encoded(np.random.default_rng(0).normal(size=(3000, 256)).astype(np.float32), tensor_type)
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
        writer.add_tensor("token_embd.weight", raw, raw_dtype=gguf.GGMLQuantizationType[tensor_type])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        tensor = read_gguf(tmp_path / "model.gguf").tensors["token_embd.weight"]
        expected = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[tensor_type]))
        assert torch.equal(tensor.read().float(), expected)
        assert np.array_equal(tensor.blocks(), raw.view(np.uint8).reshape(3000, -1))

    def test_a_float_is_read_in_its_own_dtype(self, tmp_path: Path) -> None:
        for tensor_type, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16), ("Q4_K", torch.float32)):
            save_gguf(tmp_path / "model.gguf", random_model("qwen2"), tensor_type)
            found = {tensor.name: tensor for tensor in list_tensors(tmp_path / "model.gguf")}
            assert found["model.layers.0.mlp.up_proj.weight"].read().dtype == dtype
            assert saved_dtype(tmp_path / "model.gguf") == str(dtype).removeprefix("torch.")

    def test_our_names_are_those_of_the_library_s_map(self) -> None:
        """``save_gguf`` uses that map already, so only the reverse is checked here: we have no name that it lacks."""
        from paged_infer.model.loading import gguf_model

        for arch in MODEL_TYPES:
            number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
            known = {gguf.TENSOR_NAMES[kind].removeprefix("blk.{bid}.") for kind in gguf.MODEL_TENSORS[number]}
            block = {"gpt2": gguf_model._GPT2_BLOCK, "gemma3": gguf_model._GEMMA3_BLOCK}.get(arch, gguf_model._BLOCK)
            extra = set() if arch in ("qwen3", "gemma3") else {"attn_q_norm", "attn_k_norm"}
            assert block.keys() - extra <= known, arch


class TestConfig:
    @pytest.mark.parametrize("name", MODELS)
    def test_it_is_the_config_of_the_transformers_checkpoint(self, name: str, tmp_path: Path) -> None:
        model = random_model(name)
        save_gguf(tmp_path / "model.gguf", model)
        ours = AutoConfig.for_model(**config_dict(tmp_path / "model.gguf")).to_dict()
        theirs = model.config.to_dict()
        ignored = {"pad_token_id", "initializer_range", "dtype", "architectures"}
        if name == "gpt2":
            ignored.add("n_inner")  # 4 x n_embd, which null means, too
        different = {key for key in theirs if ours.get(key) != theirs[key] and key not in ignored}
        assert not different, {key: (ours.get(key), theirs[key]) for key in different}

    def test_llama_3_s_scaling_is_recognised_by_its_factors(self, tmp_path: Path) -> None:
        save_gguf(tmp_path / "model.gguf", random_model("llama3"))
        (rope,) = set(read_config(tmp_path / "model.gguf").ropes)
        scaling = None if rope is None else rope.llama3
        assert scaling is not None and scaling.factor == LLAMA3_ROPE["factor"]
        assert scaling.original_max_position == LLAMA3_ROPE["original_max_position_embeddings"]

    def test_the_ends_of_turns_and_messages_end_an_answer(self, tmp_path: Path) -> None:
        more = {"tokenizer__ggml__eot_token_id": 7, "tokenizer__ggml__eom_token_id": 9}
        save_gguf(tmp_path / "model.gguf", random_model("qwen2"), **more)
        config = read_config(tmp_path / "model.gguf")
        assert config.eos_token_ids == (1, 7, 9) and config.bos_token_id == 0

    def test_an_embedding_that_is_stored_as_the_head_too_is_a_head_of_its_own(self, tmp_path: Path) -> None:
        save_gguf(tmp_path / "tied.gguf", random_model("qwen2"))
        save_gguf(tmp_path / "untied.gguf", random_model("qwen3"))
        assert read_config(tmp_path / "tied.gguf").tie_word_embeddings
        assert not read_config(tmp_path / "untied.gguf").tie_word_embeddings


def test_a_load_holds_one_dequantised_tensor_beside_the_weights(tmp_path: Path, monkeypatch: Any) -> None:
    """Each tensor is dropped before the next one is read."""
    import weakref

    from paged_infer.model.loading.gguf_file import GgufTensor

    save_gguf(tmp_path / "model.gguf", random_model("llama"), "Q4_K")
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    read = GgufTensor.read

    def counting(self: GgufTensor) -> torch.Tensor:
        nonlocal most
        tensor = read(self)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(GgufTensor, "read", counting)
    load_decoder(tmp_path / "model.gguf", torch.float32)
    assert most <= 2  # a tensor is freed when the next one is assigned
