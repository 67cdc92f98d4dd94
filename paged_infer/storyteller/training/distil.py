"""Train the draft model: `python -m paged_infer.storyteller.training.distil`. Its defaults made the bundled weights.

Two layers learn what six of them say: the loss is the distance from the storyteller's own distribution at every token
(distillation, Hinton et al. 2015, at temperature 1), not from the one token that came next. A draft is accepted where
both draw the same token with the same noise, so it is the distributions that should agree.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer
from torch.nn.functional import kl_div, log_softmax
from tqdm import tqdm
from transformers import Qwen3ForCausalLM

from paged_infer.storyteller import DRAFT_PATH, PATH
from paged_infer.storyteller.training.batches import Batch, Mix, Rows, stream
from paged_infer.storyteller.training.export import export
from paged_infer.storyteller.training.train import Loss, Probe, new_model, run

DRAFT_SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
}


def distance_from(teacher: Qwen3ForCausalLM) -> Loss:
    """(the same twice) the mean over tokens of KL(teacher || student), in nats."""

    def loss_of(model: Qwen3ForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        counted = batch.weights > 0  # [B, S - 1]: not the padding
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = teacher(input_ids=batch.token_ids[:, :-1], use_cache=False).logits[counted]  # [N, V]
            logits = model(input_ids=batch.token_ids[:, :-1], use_cache=False).logits[counted]
        wanted, logits = log_softmax(wanted.float(), dim=-1), log_softmax(logits.float(), dim=-1)
        distance = kl_div(logits, wanted, log_target=True, reduction="batchmean")
        return distance, distance.detach()

    return loss_of


def main(
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = DRAFT_PATH,
    seed: Annotated[int, typer.Option(help="Of the weights and of the data.")] = 0,
    steps: Annotated[int, typer.Option(help="All optimizer steps.")] = 1700,
    batch_tokens: Annotated[int, typer.Option(help="Tokens a step.")] = 1600,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train the draft model on new stories and write it in Hugging Face format."""
    torch.set_num_threads(threads)
    tokenizer = Tokenizer.from_file(str(PATH / "tokenizer.json"))
    teacher = Qwen3ForCausalLM.from_pretrained(PATH).eval()
    model = new_model(tokenizer.get_vocab_size(), seed, DRAFT_SHAPE)
    rows = Rows(tokenizer, seed)
    bar = tqdm(total=steps, unit="step")

    def every(step: int, log: list[dict[str, float]]) -> None:
        bar.update(step - bar.n)
        bar.set_postfix(nats=f"{log[-1]['loss']:.3f}", recall=f"{log[-1]['recall']:.0%}")

    run(
        model,
        stream(rows, [(steps, Mix(drills=0.2, packed=0.02, headless=0.2))], batch_tokens),
        lambda step: min(1.0, step / 50, (steps - step + 1) / (0.4 * steps)),
        Probe(rows),
        every,
        log_every=100,
        loss_of=distance_from(teacher),
    )
    bar.close()
    export(model, tokenizer, out)


if __name__ == "__main__":
    typer.run(main)
