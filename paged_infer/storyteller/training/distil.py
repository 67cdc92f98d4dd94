"""Train the draft model: `python -m paged_infer.storyteller.training.distil`. Its defaults made the bundled weights.

Two layers learn the distribution of six: the loss is the distance from the storyteller's distribution at every token
(distillation, Hinton et al. 2015, at temperature 1), not from the one token that came next. A draft is accepted where
both models sample the same token with the same noise, so it is the distributions that should agree.
"""

import torch
from tokenizers import Tokenizer
from torch.nn.functional import kl_div, log_softmax
from transformers import Qwen3ForCausalLM

from paged_infer.storyteller import DRAFT_PATH, PATH
from paged_infer.storyteller.training.batches import Batch, Mix
from paged_infer.storyteller.training.train import (
    BatchTokens,
    Loss,
    Out,
    Precision,
    Products,
    Seed,
    Steps,
    Threads,
    fit,
    new_model,
)
from paged_infer.terminal import run_command

DRAFT_SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
}


def distance_from(teacher: Qwen3ForCausalLM) -> Loss:
    """The mean over tokens of KL(teacher || student), in nats: twice, to minimize and to log."""

    def loss_of(model: Qwen3ForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        counted = batch.weights > 0  # [B, S - 1]: not the padding
        with torch.no_grad():
            wanted = teacher(input_ids=batch.token_ids[:, :-1], use_cache=False).logits[counted]  # [N, V]
        logits = model(input_ids=batch.token_ids[:, :-1], use_cache=False).logits[counted]
        wanted, logits = log_softmax(wanted.float(), dim=-1), log_softmax(logits.float(), dim=-1)
        distance = kl_div(logits, wanted, log_target=True, reduction="batchmean")
        return distance, distance.detach()

    return loss_of


def main(
    out: Out = DRAFT_PATH,
    seed: Seed = 0,
    steps: Steps = 1700,
    batch_tokens: BatchTokens = 1600,
    threads: Threads = 1,
    precision: Products = Precision.bfloat16,
) -> None:
    """Train the draft model on new stories and write it in Hugging Face format."""
    torch.set_num_threads(threads)
    tokenizer = Tokenizer.from_file(str(PATH / "tokenizer.json"))
    loss_of = distance_from(Qwen3ForCausalLM.from_pretrained(PATH).eval())
    model = new_model(tokenizer.get_vocab_size(), seed, DRAFT_SHAPE)
    phases = [(steps, Mix(drills=0.2, packed=0.02, headless=0.2))]
    fit(model, tokenizer, phases, out, seed, batch_tokens, 0.4 * steps, 100, loss_of, precision=precision)


if __name__ == "__main__":
    run_command(main)
