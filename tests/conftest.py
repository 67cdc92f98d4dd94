"""Shared fixtures: tiny random checkpoints, their transformers models, and engines over them."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub client: no test may wait for a network
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import json
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_llama_tokenizer, save_random_checkpoint, save_tokenizer
from holding import LIMIT_S, ended_after
from hypothesis import HealthCheck, settings
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from paged_infer import LLM

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell lets what it starts with & ignore it, and so its children
torch.set_num_threads(1)
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
settings.register_profile(
    "steady", deadline=None, derandomize=True, print_blob=False, suppress_health_check=[HealthCheck.too_slow]
)  # no example fails because it takes long
settings.load_profile("steady")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """A test that hangs has failed, and the others are run."""
    with ended_after(2 * LIMIT_S):  # the limits within tests come first: they say what did not come
        return (yield)


Checkpoint = Callable[[str], Path]
MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A family's name -> the folder of its random checkpoint, which no test may change."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), dict[str, Path]()

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save_random_checkpoint(name, folder)
        return made[name]

    return make


@pytest.fixture(scope="session")
def transformers_model(checkpoint: Checkpoint) -> Callable[[str], Any]:
    """A family's name -> the same checkpoint in transformers, in float32."""
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            loaded[name] = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32).eval()
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 that speaks text, and stops at either of two end tokens (ids 0 and 1)."""
    path = save_random_checkpoint("qwen3", tmp_path_factory.mktemp("text"))
    save_tokenizer(path)
    generation = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [0, 1]}))
    return path


@pytest.fixture(scope="session")
def llama_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama 2 whose greedy tokens all begin with the space that its tokenizer strips from what is decoded."""
    path = tmp_path_factory.mktemp("llama")
    model = AutoModelForCausalLM.from_pretrained(save_random_checkpoint("llama2", path / "random"))
    vocab = save_llama_tokenizer(path / "spaced")
    head = model.lm_head.weight.data
    row = head[5].clone()
    head.zero_()
    head[vocab["▁the"]], head[vocab["▁t"]] = row, -row  # one of the two logits is positive, all others are 0
    model.save_pretrained(path / "spaced")
    return path / "spaced"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--attention-backend",
        default="auto",
        help="hold this backend (a name, or module:function of your own) to every law that names no other",
    )


@pytest.fixture(scope="session")
def make_llm(checkpoint: Checkpoint, pytestconfig: pytest.Config) -> MakeLLM:
    """LLMs over the random checkpoints, small unless told otherwise."""
    usual = {
        "max_num_seqs": 8,
        "num_blocks": 64,
        "device": "cpu",
        "attention_backend": pytestconfig.getoption("--attention-backend"),
    }

    def make(name: str | Path = "qwen3", **options: Any) -> LLM:
        folder = name if isinstance(name, Path) else checkpoint(name)
        return LLM(folder, **{**usual, **options})

    return make


@pytest.fixture
def llm(make_llm: MakeLLM) -> Iterator[LLM]:
    """A fresh engine that serves token ids; whatever the test did, law 2 holds when it ends."""
    engine = make_llm()
    yield engine
    engine.check_integrity()
    assert engine.stats()["free_blocks"] == engine.stats()["num_blocks"]


@pytest.fixture
def text_llm(make_llm: MakeLLM, text_checkpoint: Path) -> Iterator[LLM]:
    """A fresh engine that serves text; whatever the test did, law 2 holds when it ends."""
    engine = make_llm(text_checkpoint)
    yield engine
    engine.check_integrity()
    assert engine.stats()["free_blocks"] == engine.stats()["num_blocks"]
