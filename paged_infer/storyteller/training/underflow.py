"""What 16 bits do to gradients: `python -m paged_infer.storyteller.training.underflow`.

The gradients of one loss of the bundled storyteller, in each precision, compared with those in float32.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3ForCausalLM

from paged_infer.storyteller import PATH
from paged_infer.storyteller.training.batches import Batch, Mix, Rows
from paged_infer.storyteller.training.mixed_precision import LossScale, autocast
from paged_infer.storyteller.training.train import Seed, weighted_loss
from paged_infer.terminal import run_command


@dataclass(frozen=True)
class Lost:
    """Of the gradients that are not 0 in float32, the share that is, in the embedding and in the layers.

    `error`: |g - g32| / |g32| of the layers' gradients, all of them as one vector.
    """

    embedding: float
    layers: float
    error: float

    @classmethod
    def of(cls, exact: dict[str, Tensor], found: dict[str, Tensor]) -> "Lost":
        """From the gradients of all weights, by name."""
        is_embedding = {name: "embed" in name for name in exact}
        one, other = (torch.cat([some[n].flatten() for n in exact if not is_embedding[n]]) for some in (exact, found))
        [embedding] = [name for name in exact if is_embedding[name]]
        error = ((other - one).norm() / one.norm()).item()
        return cls(_zeros(exact[embedding], found[embedding]), _zeros(one, other), error)


def _zeros(exact: Tensor, found: Tensor) -> float:
    there = exact != 0
    return (there & (found == 0)).sum().item() / there.sum().item()


def gradients(model: Qwen3ForCausalLM, batch: Batch, precision: torch.dtype, scale: LossScale) -> dict[str, Tensor]:
    """Of all weights by name, unscaled, in float32. A scale that overflows falls until it does not."""
    while True:
        model.zero_grad()
        with autocast(precision):
            loss, _ = weighted_loss(model, batch)
        scale.backward(loss)
        if scale.unscale(model):
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model: Qwen3ForCausalLM, batch: Batch) -> dict[str, Lost]:
    """float16 without and with a loss scale, and bfloat16."""
    fixed = LossScale.of(torch.float32)
    exact = gradients(model, batch, torch.float32, fixed)
    found = {
        "float16": gradients(model, batch, torch.float16, fixed),
        "float16, scaled": gradients(model, batch, torch.float16, LossScale.of(torch.float16)),
        "bfloat16": gradients(model, batch, torch.bfloat16, fixed),
    }
    return {name: Lost.of(exact, some) for name, some in found.items()}


def main(seed: Seed = 0, stories: Annotated[int, typer.Option(help="Stories in the batch.", min=1)] = 4) -> None:
    """Print the share of gradients that become 0, and the error of the layers' gradients, for each precision."""
    model = Qwen3ForCausalLM.from_pretrained(PATH, dtype=torch.float32)
    batch = one_batch(Rows(Tokenizer.from_file(str(PATH / "tokenizer.json")), seed), stories)
    print(f"{'':16}  became 0: embedding    layers     error of the layers' gradients")
    for name, one in compare(model, batch).items():
        print(f"{name:16} {one.embedding:20.2%} {one.layers:9.2%} {one.error:14.4f}")


def one_batch(rows: Rows, stories: int) -> Batch:
    return rows.pad([rows.row(Mix(drills=0.0)) for _ in range(stories)])


if __name__ == "__main__":
    run_command(main)
