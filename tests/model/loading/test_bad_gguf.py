"""An unusable GGUF file gives one clear error with the file, the value and the limit, before memory is allocated."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from effort import EFFORT
from gguf_files import random_model, save_gguf

from paged_infer.model.decoder import Decoder
from paged_infer.model.loading import load as loading
from paged_infer.model.loading.gguf_file import read_gguf
from paged_infer.model.loading.hub import resolve_model
from paged_infer.model.loading.load import load_decoder


class AllocatedError(Exception):
    """Memory was allocated for the weights."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    save_gguf(path, random_model("llama"), "Q8_0", general__name="random", tokenizer__ggml__tokens=["a", "b"])
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole_llama3(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    save_gguf(path, random_model("llama3"))
    return path.read_bytes()


@pytest.fixture(autouse=True)
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a decoder is allocated: files are refused before that."""

    def refuse(*args: Any) -> Decoder:
        raise AllocatedError

    monkeypatch.setattr(loading, "empty_decoder", refuse)


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        load_decoder(path, torch.float32)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def written(path: Path, content: bytes | bytearray) -> Path:
    path.write_bytes(content)
    return path


def header(num_tensors: int = 0, num_keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


class TestFile:
    def test_a_file_that_is_no_gguf_is_refused(self, tmp_path: Path) -> None:
        assert "not a GGUF file (it begins with b'PK" in refusal(written(tmp_path / "m", b"PK\x03\x04" + bytes(99)))
        assert "not a GGUF file (it has 0 bytes)" in refusal(written(tmp_path / "m", b""))
        assert "version 9: must be one of 2, 3" in refusal(written(tmp_path / "m", header(version=9)))
        assert "big-endian" in refusal(written(tmp_path / "m", header(version=3 << 24)))

    def test_a_file_cut_anywhere_is_refused_as_truncated(self, whole: bytes, tmp_path: Path) -> None:
        """It is cut in its counts, in each key, value, name and dimension, and in the data of its last tensor."""
        path = tmp_path / "cut.gguf"
        tensors = [*read_gguf(written(path, whole)).tensors.values()]
        end = max(tensor.offset + tensor.stored_shape[0] * tensor.row_bytes for tensor in tensors)  # padding follows
        start = min(tensor.offset for tensor in tensors)
        for length in [*range(4, start, 29), start + 1, end - 5000, end - 1]:
            message = refusal(written(path, whole[:length]))
            assert "truncated in its" in message and f"the file has {length}" in message, length

    @pytest.mark.parametrize("name", ["llama3", "gpt2", "gemma3"])
    def test_whatever_byte_of_the_header_is_wrong_the_error_names_the_file(self, name: str, tmp_path: Path) -> None:
        path, rng = tmp_path / "changed.gguf", random.Random(0)
        save_gguf(path, random_model(name), "Q8_0", general__name="random", tokenizer__ggml__tokens=["a", "b"])
        content = path.read_bytes()
        start = min(tensor.offset for tensor in read_gguf(path).tensors.values())
        refused = 0
        for _ in range(100 * EFFORT):
            at = rng.randrange(start)
            changed = bytearray(content)
            changed[at] = rng.choice([0, 1, 255, changed[at] ^ 1, changed[at] ^ 128])
            try:
                load_decoder(written(path, changed), torch.float32)
            except ValueError as error:
                refused += 1
                assert str(error).startswith(f"{path}: "), at
            except AllocatedError:  # the byte is not read (a name in "general"), or its new value is valid, too
                pass
        assert refused > 50 * EFFORT

    def test_a_count_that_the_file_cannot_hold_is_refused_at_once(self, tmp_path: Path) -> None:
        assert "truncated" in refusal(written(tmp_path / "m", header(num_keys=2**63)))
        assert "truncated" in refusal(written(tmp_path / "m", header(num_tensors=2**63)))
        for of in (5, 8):  # int32, string
            array = text("key") + struct.pack("<IIQ", 9, of, 2**60)
            assert "truncated in its metadata, 'key'" in refusal(written(tmp_path / "m", header(0, 1) + array))
        length = text("key") + struct.pack("<IQ", 8, 2**62)
        assert "truncated in its metadata, 'key'" in refusal(written(tmp_path / "m", header(0, 1) + length))

    def test_a_value_of_an_unknown_type_is_refused(self, tmp_path: Path) -> None:
        content = header(0, 1) + text("key") + struct.pack("<I", 77)
        assert "metadata, 'key' has values of type 77" in refusal(written(tmp_path / "m", content))
        nested = header(0, 1) + text("key") + struct.pack("<IIQ", 9, 9, 0)
        assert "metadata, 'key' has values of type 9" in refusal(written(tmp_path / "m", nested))

    def test_a_key_stored_twice_and_text_that_is_not_utf8_are_refused(self, tmp_path: Path) -> None:
        pair = text("key") + struct.pack("<IB", 0, 1)
        assert "key 'key' is stored twice" in refusal(written(tmp_path / "m", header(0, 2) + pair + pair))
        bad = text("key") + struct.pack("<IQ", 8, 1) + b"\xff"
        assert "are not UTF-8" in refusal(written(tmp_path / "m", header(0, 1) + bad))

    @pytest.mark.parametrize(
        ("dims", "number", "message"),
        [
            ((32, 2), 99, "'x' has type 99: must be one of F32, F16, BF16, Q4_0"),
            ((256, 2), 16, "'x' has type IQ2_XXS: must be one of"),
            ((33, 2), 8, r"'x' is [2, 33]: the length of rows must be a multiple of 32 for Q8_0"),
            ((0, 2), 0, "'x' is [2, 0]"),
            ((), 0, "'x' has 0 dimensions: must be 1 to 4"),
            ((1,) * 5, 0, "'x' has 5 dimensions"),
            ((2**40, 2**40), 0, "truncated in its data of tensor 'x'"),
        ],
    )
    def test_a_tensor_of_an_unsupported_type_or_size_is_refused(
        self, dims: tuple[int, ...], number: int, message: str, tmp_path: Path
    ) -> None:
        content = header(1) + text("x") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, 0)
        assert message in refusal(written(tmp_path / "m", content + bytes(64)))

    def test_a_tensor_stored_twice_and_an_impossible_alignment_are_refused(self, tmp_path: Path) -> None:
        one = text("x") + struct.pack("<IQIQ", 1, 1, 0, 0)
        assert "tensor 'x' is stored twice" in refusal(written(tmp_path / "m", header(2) + one + one + bytes(64)))
        key = text("general.alignment") + struct.pack("<II", 4, 12)
        assert "general.alignment=12: must be a power of two" in refusal(written(tmp_path / "m", header(0, 1) + key))

    def test_a_missing_file_is_refused_by_its_name(self) -> None:
        with pytest.raises(ValueError, match=r"'no/such.gguf' is neither a folder, nor a GGUF file, nor a hub id"):
            resolve_model("no/such.gguf")


class TestModel:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"general__architecture": "mamba"}, "'mamba': must be one of gemma3, gpt2, llama, qwen2, qwen3"),
            ({"general__architecture": None}, "general.architecture=None: must be one of"),
            ({"general__type": "adapter"}, "general.type='adapter' is not supported"),
            ({"split__count": 2}, "split.count=2: a model in several files"),
            ({"llama__embedding_length": None}, "llama lacks 'embedding_length'"),
            ({"llama__block_count": None}, "llama lacks 'block_count'"),
            ({"llama__attention__layer_norm_rms_epsilon": None}, "llama lacks 'attention.layer_norm_rms_epsilon'"),
            ({"llama__attention__head_count": "four"}, "llama attention.head_count='four': must be an integer"),
            ({"llama__attention__head_count_kv": [2, 2]}, "attention.head_count_kv=[2, 2]: must be an integer"),
            (
                {"llama__attention__head_count_kv": 3},
                "num_attention_heads=4 is not a multiple of num_key_value_heads=3",
            ),
            ({"llama__attention__value_length": 32}, "attention.value_length=32 is not supported; only 64 is"),
            ({"llama__rope__dimension_count": 32}, "partial_rotary_factor=0.5"),
            ({"llama__rope__scaling__type": "su"}, "llama.rope.scaling.type='su': must be one of none, linear, yarn"),
            ({"llama__expert_count": 8}, "llama.expert_count=8 is not supported"),
            ({"llama__attention__sliding_window": 99}, "llama.attention.sliding_window=99 is not supported"),
            ({"llama__attention__causal": False}, "attention.causal=False is not supported"),
            ({"tokenizer__ggml__tokens": ["a"] * 1004}, "tokenizer.ggml.tokens has 1004 tokens, the model 1003"),
            ({"tokenizer__ggml__eos_token_id": "end"}, "eos_token_id='end': must be an integer"),
            ({"llama__vocab_size": 999}, "model.embed_tokens.weight is [1003, 256], not [999, 256]"),
            ({"llama__feed_forward_length": 99}, "model.layers.0.mlp.gate_proj.weight is [512, 256], not [99, 256]"),
            ({"llama__block_count": 3}, "missing tensor model.layers.2.input_layernorm.weight"),
            ({"llama__block_count": 1}, "unexpected tensor model.layers.1."),
        ],
    )
    def test_a_key_that_is_missing_unsupported_or_contradicts_the_tensors_is_named(
        self, changes: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        save_gguf(tmp_path / "model.gguf", random_model("llama"), **changes)
        assert message in refusal(tmp_path / "model.gguf")

    def test_a_tensor_of_another_model_is_unexpected_under_its_own_name(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in {
            "block_count": 1,
            "context_length": 8,
            "embedding_length": 8,
            "feed_forward_length": 8,
        }.items():
            writer.add_uint32(f"llama.{key}", value)
        writer.add_head_count(2)
        writer.add_layer_norm_rms_eps(1e-5)
        for name in ("token_embd.weight", "blk.0.ssm_a"):
            writer.add_tensor(name, np.zeros((8, 8), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert "unexpected tensor blk.0.ssm_a [8, 8]" in refusal(path)

    def test_factors_that_llama_3_s_scaling_does_not_give_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        save_gguf(path, random_model("llama3"), llama__rope__freq_base=1234.5)
        assert "not the factors of Llama 3's scaling by 8.0" in refusal(path)

    @pytest.mark.parametrize("bad", [0.0, math.nan, -1.0, math.inf, 1e-30])
    def test_factors_that_are_no_numbers_above_zero_are_refused(
        self, bad: float, whole_llama3: bytes, tmp_path: Path
    ) -> None:
        """All factors are wrong, or one of them."""
        path = written(tmp_path / "model.gguf", whole_llama3)
        freqs = read_gguf(path).tensors["rope_freqs.weight"]
        for count in (1, freqs.shape[0]):
            changed = bytearray(whole_llama3)
            changed[freqs.offset : freqs.offset + 4 * count] = np.full(count, bad, np.float32).tobytes()
            assert "rope_freqs.weight" in refusal(written(path, changed))

    def test_factors_of_another_shape_or_beside_another_scaling_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        narrow = dict.fromkeys(("attention__key_length", "attention__value_length", "rope__dimension_count"), 32)
        save_gguf(path, random_model("llama3"), **{f"llama__{key}": value for key, value in narrow.items()})
        assert "rope_freqs.weight is [32], not [16]" in refusal(path)
        save_gguf(path, random_model("llama3"), llama__rope__scaling__factor=2.0)
        assert "rope_freqs.weight (Llama 3's scaling) together with {'rope_type': 'linear'" in refusal(path)

    @pytest.mark.parametrize("factor", [0.0, -2.0, math.nan, math.inf, "2", [2.0]])
    @pytest.mark.parametrize("kind", [None, "linear", "yarn"])
    def test_a_scaling_factor_that_is_no_number_above_zero_is_refused(self, factor, kind, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        save_gguf(path, random_model("llama"), llama__rope__scaling__factor=factor, llama__rope__scaling__type=kind)
        assert f"rope.scaling.factor={factor!r}: must be a number > 0" in refusal(path)

    def test_a_file_that_shrinks_after_its_header_was_read_is_an_error(self, whole: bytes, tmp_path: Path) -> None:
        path = written(tmp_path / "model.gguf", whole)
        tensor = [*read_gguf(path).tensors.values()][-1]
        path.write_bytes(whole[:4096])
        with pytest.raises(ValueError, match=f"{tensor.name} cannot be read"):
            tensor.read()
