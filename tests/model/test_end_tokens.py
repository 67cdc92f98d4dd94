"""End tokens: those of the files that transformers reads, and of these, those that the vocabulary has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB
from transformers import AutoModelForCausalLM, GenerationConfig

from paged_infer import BeamSearchParams, SamplingParams
from paged_infer.model.config import ModelConfig

ABSENT = object()
PROMPTS = [[5, 900, 17, 17, 2, 333], [64, 1002, 40]]


@pytest.fixture
def folder(checkpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("llama2"), tmp_path / "copy"))


def write(folder: Path, of_model: Any, of_generation: Any) -> None:
    """Set both files' end tokens. ABSENT: the key is not there; for generation, None is no file at all."""
    raw = json.loads((folder / "config.json").read_text())
    raw["eos_token_id"] = of_model
    if of_model is ABSENT:
        del raw["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if of_generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(of_generation))


@pytest.mark.parametrize("of_generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": [7, 8]}], ids=str)
@pytest.mark.parametrize("of_model", [ABSENT, None, 5, [5, 6]], ids=["absent", "null", "one", "two"])
def test_end_tokens_are_those_of_transformers(of_model, of_generation, folder: Path) -> None:
    write(folder, of_model, of_generation)
    expected = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    as_list = [] if expected is None else expected if isinstance(expected, list) else [expected]
    assert list(ModelConfig.from_pretrained(folder).eos_token_ids) == as_list


def test_an_end_token_that_the_generation_config_leaves_out_is_named(folder: Path, caplog) -> None:
    write(folder, 5, {})
    assert ModelConfig.from_pretrained(folder).eos_token_ids == ()
    (record,) = caplog.records
    assert "config.json's 5 is not used" in record.getMessage()


@pytest.mark.parametrize(
    ("eos", "kept", "beyond"),
    [
        (VOCAB - 1, (VOCAB - 1,), None),
        (VOCAB, (), f"{VOCAB}"),
        (151645, (), "151645"),
        ([2, VOCAB + 40, 0, 2, 10**30], (2, 0), f"{VOCAB + 40}, {10**30}"),
        ([], (), None),
    ],
)
@pytest.mark.parametrize("in_generation", [False, True])
def test_end_tokens_beyond_the_vocabulary_are_left_out_and_named(
    eos, kept, beyond, in_generation: bool, folder: Path, caplog
) -> None:
    write(folder, *((None, {"eos_token_id": eos}) if in_generation else (eos, None)))
    assert ModelConfig.from_pretrained(folder).eos_token_ids == kept
    logged = [record.getMessage() for record in caplog.records]
    assert logged == ([] if beyond is None else [f"eos_token_id {beyond} ignored: the vocabulary has {VOCAB} tokens"])


@pytest.mark.parametrize("eos", [-1, [3, -1], 2.0, "2", True, [None], {"id": 2}])
@pytest.mark.parametrize("in_generation", [False, True])
def test_an_end_token_that_is_no_token_id_is_refused(eos, in_generation: bool, folder: Path) -> None:
    write(folder, *((None, {"eos_token_id": eos}) if in_generation else (eos, None)))
    with pytest.raises(ValueError, match=r"eos_token_id=.*: must be an integer >= 0 or a list of them"):
        ModelConfig.from_pretrained(folder)


def greedy(folder: Path, prompt: list[int], **options: Any) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0, **options)
    return found[0, len(prompt) :].tolist()


def test_an_end_token_beyond_the_vocabulary_forbids_no_token_of_a_neighbour(folder: Path, make_llm) -> None:
    """Row 0's id VOCAB + t is, in a batch of rows, the place of row 1's t."""
    write(folder, None, None)
    best = greedy(folder, PROMPTS[1])[0]
    for beyond in (VOCAB + best, VOCAB + 40, 151645):
        write(folder, beyond, None)
        assert GenerationConfig.from_pretrained(folder, "config.json").eos_token_id == beyond
        llm = make_llm(folder)
        params = SamplingParams(temperature=0, max_tokens=6, min_tokens=3)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == [
            greedy(folder, prompt, min_new_tokens=3) for prompt in PROMPTS
        ]


def test_a_beam_search_passes_over_end_tokens_beyond_the_vocabulary(folder: Path, make_llm) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=5, min_tokens=3)
    answers = []
    for eos in (None, VOCAB + 40, [VOCAB, 151645]):
        write(folder, eos, None)
        outputs = make_llm(folder).beam_search(PROMPTS, params, use_tqdm=False)
        answers.append([answer.token_ids for output in outputs for answer in output.outputs])
    assert answers[0] == answers[1] == answers[2]
