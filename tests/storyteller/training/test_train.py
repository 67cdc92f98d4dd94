"""Claims about training: rows are whole documents, a seed fixes them, and one command leaves a model behind."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_infer.storyteller.training import distil, train, vocabulary
from paged_infer.storyteller.training.batches import CONTEXT, Mix, Rows, stream


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.train_tokenizer(num_stories=500)


def test_a_row_is_one_whole_document(tokenizer):
    rows = Rows(tokenizer, seed=1)
    for _ in range(20):
        row, _ = rows.row(Mix(drills=0.5))
        assert row[0] == row[-1] == rows.end and rows.end not in row[1:-1]


def test_a_packed_row_fills_the_context(tokenizer):
    row, _ = Rows(tokenizer, seed=1).row(Mix(drills=0.0, packed=1.0))
    assert len(row) == CONTEXT and row.count(0) >= 2


def test_headless_documents_start_like_a_users_prompt(tokenizer):
    rows = Rows(tokenizer, seed=1)
    starts = {tuple(rows.row(Mix(drills=0.3, headless=1.0))[0][:2]) for _ in range(40)}
    assert rows.end not in {start[0] for start in starts} and len(starts) > 3


def test_only_answers_weigh_more(tokenizer):
    rows = Rows(tokenizer, seed=0)
    row = [rows.end, *tokenizer.encode("A Q: Who has it?\nA: Tom.\nQ: Who?\n").ids, rows.end]
    heavy = [token for token, weight in zip(row[1:], rows.weights(row, 3.0, 0.5), strict=True) if weight == 3.0]
    assert tokenizer.decode(heavy) == " Tom.\n"


def test_a_seed_fixes_the_batches_and_padding_weighs_nothing(tokenizer):
    phases = [(3, Mix(drills=0.5)), (2, Mix(drills=0.0, answer_weight=3.0))]
    one = list(stream(Rows(tokenizer, seed=5), phases, tokens=1500))
    two = list(stream(Rows(tokenizer, seed=5), phases, tokens=1500))
    assert len(one) == 5
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.token_ids, b.token_ids) and torch.equal(a.weights, b.weights)
        for row, weights in zip(a.token_ids, a.weights, strict=True):
            length = int((weights > 0).sum()) + 1
            assert (row[length:] == 0).all() and row[length - 1] == 0 and (weights[: length - 1] > 0).all()


@pytest.fixture
def small_model(tokenizer):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return train.new_model(tokenizer.get_vocab_size(), 0, shape | {"intermediate_size": 64})


def test_each_matrix_of_the_layers_gets_an_orthogonal_update_and_adamw_has_the_rest(small_model):
    muon, adamw = train.optimizers(small_model)
    sizes = [sum(p.numel() for group in tool.param_groups for p in group["params"]) for tool in (muon, adamw)]
    assert sum(sizes) == small_model.num_parameters() and sizes[1] > small_model.lm_head.weight.numel()
    weight = small_model.model.layers[0].mlp.up_proj.weight  # [64, 32]
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    muon.step()
    update = (weight.detach() - (1 - 5e-3 * 0.01) * before) / 5e-3
    values = torch.linalg.svdvals(update) / (0.2 * 64**0.5)
    assert values.min() > 0.6 and values.max() < 1.3


def test_training_descends(tokenizer, small_model, tmp_path):
    log = train.fit(small_model, tokenizer, [(40, Mix(drills=0.5))], tmp_path / "model", 0, 500, 10, log_every=10)
    losses = [entry["loss"] for entry in log]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)


def test_a_draft_learns_the_distribution_of_its_teacher(tokenizer, small_model):
    batch = next(stream(Rows(tokenizer, seed=0), [(1, Mix(drills=0.5))], tokens=300))
    same, _ = distil.distance_from(small_model)(small_model, batch)
    other, _ = distil.distance_from(small_model)(train.new_model(tokenizer.get_vocab_size(), 1), batch)
    assert abs(same) < 1e-6 < 0.1 < other


def test_the_draft_is_written_by_one_command_too(tmp_path):
    distil.main(out=tmp_path / "draft", steps=1, batch_tokens=300, threads=torch.get_num_threads())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "draft").config.num_hidden_layers == 2


def test_one_command_trains_writes_and_draws(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_tokenizer", lambda: tokenizer)
    threads = torch.get_num_threads()
    folder = tmp_path / "model"
    options = {"steps": 2, "decay_steps": 1, "batch_tokens": 300, "log_every": 1}
    train.main(out=folder, figures=tmp_path, threads=threads, **options)
    log = json.loads((tmp_path / "storyteller_loss.json").read_text())["log"]
    assert [entry["step"] for entry in log] == [1, 2] and all(0 < entry["loss"] < 20 for entry in log)
    assert (tmp_path / "storyteller_loss.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("A story about", return_tensors="pt").input_ids
    assert model(ids).logits.dtype == torch.float32
