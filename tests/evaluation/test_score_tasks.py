"""Scores of the storyteller equal computations by hand, and what is asked in windows, chats or ranks is the same."""

from __future__ import annotations

import math

import pytest
import torch

from paged_infer import LLM, SamplingParams, storyteller
from paged_infer.evaluation.distance import distance, predictions
from paged_infer.evaluation.items import documents
from paged_infer.evaluation.models import InProcess, windows
from paged_infer.evaluation.score import Score, compare, score
from paged_infer.evaluation.tasks import TASKS, completion, examples
from paged_infer.model.quant.calibration import log_probs


@pytest.fixture(scope="module")
def model() -> InProcess:
    return InProcess(LLM(device="cpu", num_blocks=512))


@pytest.fixture(scope="module")
def rounded() -> InProcess:
    return InProcess(LLM(device="cpu", num_blocks=512, quantization="w4a16"), "w4a16")


def test_recall_and_perplexity_are_those_of_storyteller_evaluate(model: InProcess) -> None:
    known = storyteller.evaluate(model.llm, num_stories=8)
    found = score(model, TASKS["perplexity"], TASKS["perplexity"].make(8, 0))
    assert found.estimates()["token_perplexity"].value == pytest.approx(known["perplexity"], rel=1e-6)
    recall = score(model, TASKS["recall"], TASKS["recall"].make(8, 0))
    assert recall.estimates()["exact_match"].value == 1.0 == known["recall"]
    assert sum(asked for _, asked in recall.by_kind().values()) == 8


def test_a_choice_is_scored_by_the_log_probabilities_of_its_tokens(model: InProcess) -> None:
    task = TASKS["ending"]
    items, shots = task.make(4, 2), examples(task, 1, 2)
    found = score(model, task, items, shots)
    for number, item in enumerate(items):
        sums = []
        for choice in item.choices:
            prompt = model.tokenizer.encode(completion(task, item, shots))
            whole = model.tokenizer.encode(completion(task, item, shots) + choice)
            assert whole[: len(prompt)] == prompt
            rows = log_probs(model.llm.engine.decoder, whole)
            sums.append(sum(rows[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))))
        by_length = [total / len(choice) for total, choice in zip(sums, item.choices, strict=True)]
        assert found.answers[number] == item.choices[sums.index(max(sums))]
        assert found.right["acc"][number] == (sums.index(max(sums)) == item.label)
        assert found.right["acc_norm"][number] == (by_length.index(max(by_length)) == item.label)


def test_a_chat_asks_the_same_by_the_model_s_template(model: InProcess) -> None:
    """The storyteller's template writes documents, which only lack the token that opens one."""
    for name in ("recall", "choice"):
        task = TASKS[name]
        items = task.make(4, 0)
        assert score(model, task, items, chat=True).right == score(model, task, items).right
    with pytest.raises(ValueError, match="has no question to ask in a chat"):
        score(model, TASKS["ending"], TASKS["ending"].make(1, 0), chat=True)


@pytest.mark.parametrize("size", [2, 3, 5, 8, 9, 20])
def test_windows_hold_every_token_once_and_give_the_last_ones_all_the_context_that_fits(size: int) -> None:
    ids = list(range(9))
    parts = list(windows(ids, 1, size))
    assert [token for _, continuation in parts for token in continuation] == ids[1:]
    for context, continuation in parts:
        assert (
            len(context) + len(continuation) <= size
            and [*context, *continuation] == ids[context[0] : continuation[-1] + 1]
        )
    assert len(parts[-1][0]) + len(parts[-1][1]) == min(size, 9)


def test_a_text_longer_than_the_context_is_read_in_windows(model: InProcess) -> None:
    (item,) = documents(1, 0)
    short = InProcess(LLM(device="cpu", num_blocks=512, max_model_len=65))
    ids = model.with_prefix(item.passage)
    assert len(ids) > 3 * 64
    expected = []
    for context, continuation in windows(ids, 1, 64):
        rows = log_probs(model.llm.engine.decoder, [*context, *continuation])[len(context) - 1 : -1]
        expected += [row[token].item() for row, token in zip(rows, continuation, strict=True)]
    (found,) = short.rolling([item.passage])
    assert [one.logprob for one in found] == pytest.approx(expected, abs=1e-3)
    (whole,) = model.rolling([item.passage])
    assert len(whole) == len(found) and sum(one.logprob for one in whole) > sum(expected)  # more context helps


def test_the_prefix_token_is_part_of_a_perplexity(model: InProcess) -> None:
    """The first word after it is predicted, too, and at a price that another prefix changes."""
    (item,) = documents(1, 0)
    (known,) = model.rolling([item.passage])
    assert model.prefix_token_ids == [0] and len(known) == len(model.tokenizer.encode(item.passage))
    other = InProcess(model.llm)
    other.prefix_token_ids = model.tokenizer.encode("\n")
    (found,) = other.rolling([item.passage])
    assert found[0].logprob < known[0].logprob - 1.0


def test_a_text_needs_a_prompt_and_room(model: InProcess) -> None:
    with pytest.raises(ValueError, match="0 and 2 tokens: a continuation needs a token before it"):
        model.continuations([([], [5, 6])])
    with pytest.raises(ValueError, match="at most max_model_len - 1 = 1023"):
        model.continuations([([5], [5] * 1023)])


def test_the_distance_to_itself_is_zero_and_to_fewer_bits_is_not(model: InProcess, rounded: InProcess) -> None:
    texts = [item.passage for item in documents(2, 0)]
    same = distance(model, model, texts)
    assert same.kl.value == 0 and same.agreement.value == 1
    other = distance(model, rounded, texts)
    assert 1e-5 < other.kl.value < 0.01 and 0.9 < other.agreement.value < 1
    kl = agreed = count = 0.0
    for text in texts:
        before, after = (log_probs(one.llm.engine.decoder, one.with_prefix(text)).double() for one in (model, rounded))
        kl += (before.exp() * (before - after)).sum().item()
        agreed += (before.argmax(1) == after.argmax(1)).sum().item()
        count += len(before)
    assert other.kl.value == pytest.approx(kl / count, rel=1e-3)
    assert other.agreement.value == pytest.approx(agreed / count)


def test_ranks_in_other_processes_give_the_same_distributions(model: InProcess) -> None:
    ids = model.with_prefix("Once upon a time")
    llm = LLM(device="cpu", num_blocks=64, tensor_parallel_size=2)
    try:
        found = predictions(InProcess(llm), ids)
    finally:
        llm.shutdown()
    torch.testing.assert_close(found, predictions(model, ids), rtol=0, atol=1e-4)


def test_models_that_tokenize_differently_are_not_compared(model: InProcess) -> None:
    other = InProcess(model.llm, "other")
    other.prefix_token_ids = [5]
    with pytest.raises(ValueError, match="other: has another vocabulary than storyteller"):
        distance(model, other, ["Once upon a time"])


def test_a_request_that_fails_is_named(model: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    output = model.run([[5, 6]], SamplingParams(max_tokens=1))[0]
    output.outputs[0].error = "NaN in its logits"
    monkeypatch.setattr(model.llm, "generate", lambda *_, **__: [output])
    with pytest.raises(ValueError, match="storyteller: prompt 0: NaN in its logits"):
        model.generate([[5, 6]], 1, ())


def test_perplexities_of_two_models_are_compared_text_by_text() -> None:
    """Texts differ by far more than the models do, so the ratio's interval is far narrower than either's own."""
    tokens = [100.0, 200.0, 150.0, 120.0]
    nats = [20.0, 90.0, 30.0, 50.0]
    more = [
        one + 0.01 * count + wobble for one, count, wobble in zip(nats, tokens, (0.1, -0.1, 0.05, -0.05), strict=True)
    ]
    amounts = {"tokens": tokens, "words": tokens, "bytes": tokens}
    before, after = (Score("perplexity", amounts={"nats": one, **amounts}) for one in (nats, more))
    found = compare(before, after)["token_perplexity"]
    assert found.value == pytest.approx(math.exp(0.01), rel=1e-3) and found.low > 1
    own = before.estimates()["token_perplexity"]
    assert own.low < after.estimates()["token_perplexity"].value < own.high
