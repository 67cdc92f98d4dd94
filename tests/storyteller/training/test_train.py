"""Claims about training: rows are whole documents, a seed fixes them, and one command leaves a model behind."""

import json
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_infer.storyteller.training import train, vocabulary
from paged_infer.storyteller.training.batches import CONTEXT, Mix, Rows, stream
from paged_infer.storyteller.training.muon import Muon, orthogonalize


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


def test_muon_updates_are_nearly_orthogonal():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 24, 60)))
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_descends():
    torch.manual_seed(0)
    target, weight = torch.randn(12, 30), torch.nn.Parameter(torch.zeros(12, 30))
    tool, losses = Muon([weight], lr=0.05), []
    for _ in range(60):
        loss = (weight - target).square().mean()
        losses.append(loss.item())
        tool.zero_grad()
        loss.backward()
        tool.step()
    assert losses[-1] < 0.3 * losses[0]
    assert all(later < earlier for earlier, later in pairwise(losses[:10]))


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
