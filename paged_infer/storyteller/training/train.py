"""Train the storyteller: `python -m paged_infer.storyteller.training.train`. Its defaults made the bundled weights."""

import json
import random
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from paged_infer.storyteller import PATH
from paged_infer.storyteller.stories.grammar import FIRST_EVALUATION_SEED
from paged_infer.storyteller.training.batches import CONTEXT, Batch, Mix, Rows, stream
from paged_infer.storyteller.training.export import export, plot
from paged_infer.storyteller.training.mixed_precision import LossScale, autocast
from paged_infer.storyteller.training.vocabulary import train_tokenizer
from paged_infer.terminal import run_command

SHAPE = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 640,
}
SAVE_EVERY = 500  # steps
Loss = Callable[[Any, Batch], tuple[torch.Tensor, torch.Tensor]]  # (to minimize, to log)
Optimizers = Callable[[Any], list[torch.optim.Optimizer]]
Save = Callable[[Any, Tokenizer, Path], None]


class Precision(Enum):
    """Of the products; weights, gradients and optimizers are float32."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.value)
        return found


# The options that all training commands have.
Out = Annotated[Path, typer.Option(help="Folder for the model.")]
Seed = Annotated[int, typer.Option(help="Seed of the weights and the data.")]
Steps = Annotated[int, typer.Option(help="Optimizer steps in total.")]
BatchTokens = Annotated[int, typer.Option(help="Tokens per step.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
Products = Annotated[Precision, typer.Option(help="Of products; float16 has a loss scale, and is slow on most CPUs.")]


def new_model(vocab_size: int, seed: int, shape: dict[str, int] = SHAPE) -> Qwen3ForCausalLM:
    """A Qwen3 of 3.1M parameters (or of another shape), initialized so that it learns early to look back.

    Two things help: weights of about 1 / sqrt(hidden), where 0.02 is usual, and `begin_by_matching`.
    """
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            **shape,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            initializer_range=0.07,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=None,
        )
    )
    begin_by_matching(model)
    return model


@torch.no_grad()
def begin_by_matching(model: Qwen3ForCausalLM) -> None:
    """Let the first head of each layer attend to whatever resembles the current token, and copy it.

    Its queries are made equal to its keys, both in the slowly turning half of the rotary dimensions, so that distance
    does not blur the match; its output undoes its values. This is "mimetic" initialization (Trockman and Kolter, 2023).
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        size = attention.head_dim
        fast = torch.arange(size) % (size // 2) < size // 4  # dimensions i and i + size / 2 turn together
        attention.k_proj.weight[:size] *= torch.where(fast, 0.1, 1.0)[:, None]
        attention.q_proj.weight[:size] = attention.k_proj.weight[:size]
        attention.o_proj.weight[:, :size] = attention.v_proj.weight[:size].T


def optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon (Jordan, 2024) for the matrices of the layers, AdamW for the embedding and the norms, at their full rates.

    Muon's updates are scaled to a root mean square of 0.2 * lr, about AdamW's (Liu et al., 2025, "Muon is scalable").
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=5e-3, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def weighted_loss(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted mean, plain mean) of the nats per predicted token."""
    logits = model(input_ids=batch.token_ids[:, :-1], use_cache=False).logits  # [B, S - 1, vocabulary]
    nats = cross_entropy(logits.float().flatten(0, 1), batch.token_ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights.flatten()
    return (nats * weights).sum() / weights.sum(), nats.detach()[weights > 0].mean()


class Probe:
    """The share of answers in unseen stories that the model gets right greedily, measured without generating."""

    def __init__(self, rows: Rows, num_batches: int = 2) -> None:
        unseen = Rows(rows.tokenizer, seed=0)
        unseen.random = random.Random(FIRST_EVALUATION_SEED)
        self.batches = unseen.batches(Mix(drills=0.0, answer_weight=2.0), tokens=4000)[:num_batches]
        self.end_of_answer = rows.newline

    @torch.no_grad()
    def recall(self, model: PreTrainedModel) -> float:
        """An answer counts if each of its tokens is the most probable one given the true tokens before it."""
        right = asked = 0
        for batch in self.batches:
            logits = model(input_ids=batch.token_ids[:, :-1], use_cache=False).logits
            guesses = logits.argmax(-1)  # [B, S - 1]
            for targets, guess, weights in zip(batch.token_ids[:, 1:], guesses, batch.weights, strict=True):
                found = answers(targets, guess, weights > 1.0, self.end_of_answer)
                right, asked = right + sum(found), asked + len(found)
        return right / asked


def answers(targets: torch.Tensor, guesses: torch.Tensor, in_answer: torch.Tensor, end: int) -> list[bool]:
    """Whether each answer is guessed right, all its tokens and the `end` of its line; [S] token ids, twice, and [S]."""
    found, good = [], True
    for i in in_answer.nonzero().flatten().tolist():
        good = good and bool(guesses[i] == targets[i])
        if targets[i] == end:
            found.append(good)
            good = True
    return found


def fit(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    phases: list[tuple[int, Mix]],
    out: Path,
    seed: int,
    batch_tokens: int,
    decay_steps: float,
    log_every: int,
    loss_of: Loss = weighted_loss,
    *,
    precision: Precision = Precision.bfloat16,
    rate: float = 1.0,
    optimizers_of: Optimizers = optimizers,
    save: Save = export,
    rows_of: type[Rows] = Rows,
) -> list[dict[str, float]]:
    """Train `model` for the steps of all `phases` and `save` it to `out`, at the end and every `SAVE_EVERY` steps.

    The learning rates, times `rate`, rise over 50 steps and fall linearly to 0 over the last `decay_steps`. Returns the
    loss and the recall of unseen facts, measured every `log_every` steps.

    Raises:
        FloatingPointError: the gradients are infinite or NaN; in float16, even without a loss scale.
    """
    steps = sum(count for count, _ in phases)
    rows = rows_of(tokenizer, seed)
    probe = Probe(rows)
    all_optimizers = optimizers_of(model)
    rates = [rate * optimizer.param_groups[0]["lr"] for optimizer in all_optimizers]
    scale = LossScale.of(precision.dtype)
    log: list[dict[str, float]] = []
    losses: list[float] = []
    tokens = 0
    bar = tqdm(stream(rows, phases, batch_tokens), total=steps, unit="step")
    for step, batch in enumerate(bar, start=1):
        with autocast(precision.dtype):
            loss, plain = loss_of(model, batch)
        scale.backward(loss)
        if scale.unscale(model):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, full in zip(all_optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = full * min(1.0, step / 50, (steps - step + 1) / decay_steps)
                optimizer.step()
        model.zero_grad()
        losses.append(plain.item())
        tokens += int((batch.weights > 0).sum())
        if step % log_every == 0:
            with autocast(precision.dtype):
                recall = probe.recall(model)
            log.append({"step": step, "tokens": tokens, "loss": sum(losses) / len(losses), "recall": recall})
            losses = []
            bar.set_postfix(loss=f"{log[-1]['loss']:.3f}", recall=f"{recall:.0%}")
        if step % SAVE_EVERY == 0:
            save(model, tokenizer, out)
    save(model, tokenizer, out)
    return log


def main(
    out: Out = PATH,
    figures: Annotated[Path, typer.Option(help="Folder for the loss curve.")] = Path("results"),
    seed: Seed = 0,
    steps: Steps = 2400,
    decay_steps: Annotated[int, typer.Option(help="Final steps, over which the learning rates fall to 0.")] = 900,
    batch_tokens: BatchTokens = 1600,
    log_every: Annotated[int, typer.Option(help="Steps between two measurements of recall.")] = 50,
    threads: Threads = 1,
    precision: Products = Precision.bfloat16,
) -> None:
    """Train the storyteller and write it in Hugging Face format, with a picture of its loss."""
    torch.set_num_threads(threads)
    tokenizer = train_tokenizer()
    model = new_model(tokenizer.get_vocab_size(), seed)
    log = fit(model, tokenizer, phases(steps), out, seed, batch_tokens, decay_steps, log_every, precision=precision)
    figures.mkdir(parents=True, exist_ok=True)
    (figures / "storyteller_loss.json").write_text(json.dumps({"seed": seed, "steps": steps, "log": log}) + "\n")
    plot(log, figures / "storyteller_loss.png")


def phases(steps: int) -> list[tuple[int, Mix]]:
    """(steps, mix of rows): memory games, in which mainly the answers count, then stories."""
    games = [
        Mix(drills=0.8, most_facts=3, answer_weight=5.0, drill_weight=0.1),
        Mix(drills=0.7, most_facts=4, answer_weight=5.0, drill_weight=0.3),
    ]
    each = min(500, steps // 4)
    stories = Mix(drills=0.2, packed=0.02, headless=0.2, answer_weight=4.0)
    return [*((each, mix) for mix in games), (steps - 2 * each, stories)]


if __name__ == "__main__":
    run_command(main)
