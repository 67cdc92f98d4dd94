"""Claims about training in 16 bits: masters stay float32, float16 needs a loss scale, and bfloat16 does not."""

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import Qwen3ForCausalLM

from paged_infer.storyteller import PATH
from paged_infer.storyteller.training import train, underflow
from paged_infer.storyteller.training.batches import Mix, Rows, stream
from paged_infer.storyteller.training.mixed_precision import LossScale, autocast
from paged_infer.storyteller.training.vocabulary import train_tokenizer

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(num_stories=500)


@pytest.fixture
def small_model(tokenizer):
    return train.new_model(tokenizer.get_vocab_size(), 0, SHAPE | {"intermediate_size": 64})


def test_float16_loses_gradients_without_a_loss_scale_and_bfloat16_does_not():
    rows = Rows(Tokenizer.from_file(str(PATH / "tokenizer.json")), seed=0)
    model = Qwen3ForCausalLM.from_pretrained(PATH, dtype=torch.float32)
    found = underflow.compare(model, underflow.one_batch(rows, stories=1))
    plain, scaled, bfloat16 = found["float16"], found["float16, scaled"], found["bfloat16"]
    assert plain.embedding > 0.4 > 0.001 > scaled.embedding and bfloat16.embedding == bfloat16.layers == 0
    assert plain.layers > 0.001 > 1e-5 > scaled.layers
    assert scaled.error < 0.3 * bfloat16.error < plain.error  # float16 has three more bits than bfloat16


@pytest.mark.parametrize("precision", train.Precision)
def test_weights_gradients_and_optimizers_stay_float32_and_training_descends(
    precision, tokenizer, small_model, tmp_path
):
    seen = []

    def loss_of(model, batch):
        seen.append(model.lm_head(torch.zeros(1, 32)).dtype)
        return train.weighted_loss(model, batch)

    [batch] = stream(Rows(tokenizer, seed=3), [(1, Mix(drills=0.5))], tokens=300)
    before, _ = train.weighted_loss(small_model, batch)
    phases = [(8, Mix(drills=0.5))]
    train.fit(small_model, tokenizer, phases, tmp_path / "m", 0, 300, 8, 8, loss_of, precision=precision)
    assert set(seen) == {precision.dtype}
    assert {p.dtype for p in small_model.parameters()} == {torch.float32}
    after, _ = train.weighted_loss(small_model, batch)
    assert after < before - 0.03


def linear_with_gradient(value: float) -> nn.Linear:
    linear = nn.Linear(2, 1, bias=False)
    linear.weight.grad = torch.full((1, 2), value)
    return linear


def test_a_step_with_infinite_gradients_is_skipped_and_halves_the_scale():
    scale = LossScale(8.0, interval=2)
    for value in (torch.inf, torch.nan, -torch.inf):
        assert not scale.unscale(linear_with_gradient(value))
    assert scale.scale == 1.0 and scale.skipped_steps == 3
    with pytest.raises(FloatingPointError, match="infinite or NaN at a loss scale of 1"):
        scale.unscale(linear_with_gradient(torch.inf))


def test_the_scale_grows_after_an_interval_of_good_steps_in_a_row():
    scale, seen = LossScale(8.0, interval=3), []
    for value in (4.0, 4.0, torch.inf, 4.0, 4.0, 4.0, 4.0):
        scale.unscale(linear_with_gradient(value))
        seen.append(scale.scale)
    assert seen == [8, 8, 4, 4, 4, 8, 8]


def test_gradients_are_divided_by_the_scale_that_multiplied_the_loss():
    linear, x, scale = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, -5.0]]), LossScale(1024.0)
    scale.backward(linear(x).sum())
    assert torch.equal(linear.weight.grad, 1024 * x) and scale.unscale(linear) and torch.equal(linear.weight.grad, x)


def test_the_rule_is_that_of_torch():
    """The same scales as torch.amp.GradScaler's, through good and infinite gradients."""
    ours, theirs = LossScale(interval=3), torch.amp.GradScaler("cpu", growth_interval=3)
    for value in (1.0, torch.inf, torch.nan, *[1.0] * 7, torch.inf, *[1.0] * 4):
        linear = linear_with_gradient(value)
        tool = torch.optim.SGD(linear.parameters(), lr=0.0)
        theirs.scale(torch.ones(()))  # starts it
        theirs.step(tool)
        theirs.update()
        ours.unscale(linear_with_gradient(value))
        assert ours.scale == theirs.get_scale()


def test_outside_of_float16_the_scale_is_1_for_good():
    scale = LossScale.of(torch.bfloat16)
    assert all(scale.unscale(linear_with_gradient(4.0)) for _ in range(2500)) and scale.scale == 1.0
    with pytest.raises(FloatingPointError):
        scale.unscale(linear_with_gradient(torch.inf))


def test_a_training_step_that_overflows_changes_no_weight(tokenizer, small_model, tmp_path):
    before = {name: value.clone() for name, value in small_model.state_dict().items()}

    def overflowing(model, batch):
        loss, plain = train.weighted_loss(model, batch)
        return loss * 1e38, plain  # times 65,536 it is infinite

    phases = [(2, Mix(drills=0.5))]
    precision = train.Precision.float16
    train.fit(small_model, tokenizer, phases, tmp_path / "m", 0, 300, 10, 2, overflowing, precision=precision)
    assert all(torch.equal(before[name], value) for name, value in small_model.state_dict().items())


def test_float32_is_no_autocast():
    with autocast(torch.float32):
        assert nn.Linear(2, 1)(torch.zeros(1, 2)).dtype == torch.float32
