"""Train the storyteller for few bits: `python -m paged_infer.storyteller.training.qat FOLDER --scheme w2a16`.

Quantisation-aware training (Jacob 2018, section 3): from the bundled weights on, each linear layer computes with
rounded weights, and the float weights behind them are trained by the straight-through estimator. The loss is the
distance from the float model's distribution, as in `distil`, which is also what is measured: KL(float || quantised).

The result is compared with three methods that only look at a few texts: round to nearest, AWQ and GPTQ.
"""

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import Qwen3ForCausalLM

from paged_infer.execution.machine import describe_machine
from paged_infer.model.decoder import Decoder
from paged_infer.model.linear import DENSE
from paged_infer.model.loading.checkpoint import config_dict
from paged_infer.model.loading.load import load_decoder
from paged_infer.model.loading.save_quantised import save_quantised
from paged_infer.model.quant.calibration import Texts, divergence, log_probs
from paged_infer.model.quant.fake import FakeQuantise
from paged_infer.model.quant.post_training import quantise_decoder
from paged_infer.model.quant.scheme import Scheme
from paged_infer.storyteller import PATH
from paged_infer.storyteller.evaluation import document
from paged_infer.storyteller.stories.grammar import FIRST_EVALUATION_SEED, tell
from paged_infer.storyteller.training.batches import Mix, Rows
from paged_infer.storyteller.training.distil import distance_from
from paged_infer.storyteller.training.export import export
from paged_infer.storyteller.training.train import BatchTokens, Precision, Products, Seed, Steps, Threads, answers, fit
from paged_infer.terminal import run_command

BITS = {"w2a16": 2, "w3a16": 3, "w4a16": 4}
FIRST_CALIBRATION_SEED, NUM_CALIBRATION = 50_000_000, 24  # stories that AWQ and GPTQ look at
_MASTER = "parametrizations.weight.original"


def scheme_of(name: str, group_size: int, *, symmetric: bool = False) -> Scheme:
    """`w2a16`, `w3a16` or `w4a16`: weights of so many bits, in groups; inputs stay floats."""
    if name not in BITS:
        raise ValueError(f"scheme={name!r}: must be one of {', '.join(BITS)}")
    return Scheme(BITS[name], symmetric, "group", group_size)


def fake_quantised(model: Qwen3ForCausalLM, scheme: Scheme) -> Qwen3ForCausalLM:
    """`model` itself, whose linear layers but the head compute with rounded weights from now on; training goes on."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            scheme.group(module.in_features, name)
            register_parametrization(module, "weight", FakeQuantise(scheme))
    return model


def masters(model: Qwen3ForCausalLM) -> dict[str, torch.Tensor]:
    """The weights that are trained, by their names in a checkpoint: matrices in float32, the embedding in bfloat16."""
    tensors = {name.replace(_MASTER, "weight"): tensor for name, tensor in model.state_dict().items()}
    return {name: tensor.bfloat16() if "embed" in name else tensor for name, tensor in tensors.items()}


def export_quantised(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path, scheme: Scheme) -> None:
    """Write a `fake_quantised` model to `folder`, its matrices as codes in compressed-tensors' format.

    They are the codes that training computed with: the grid of the float weights, each rounded to nearest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        draft = Path(name) / "model"
        export(model, tokenizer, draft, masters(model))
        decoder = dense_decoder(draft)
        save_quantised(draft, config_dict(draft), decoder, quantise_decoder(decoder, scheme), scheme)
        for file in sorted(draft.iterdir()):
            os.replace(file, folder / file.name)


def dense_decoder(folder: Path) -> Decoder:
    return load_decoder(folder, torch.float32, method_of=lambda name: DENSE)


@dataclass(frozen=True)
class Quality:
    """Of a quantised model, on texts that neither training nor calibration saw.

    `kl`: KL(float || quantised), in nats per token. `same_top`: share of the positions where both have the same most
    probable token. `recall`: share of answers in the stories whose every token is the most probable one, which is what
    greedy decoding gives.
    """

    kl: float
    same_top: float
    perplexity: float
    recall: float


class Judge:
    """Measures decoders against the float model on the first stories for evaluation."""

    def __init__(self, reference: Decoder, tokenizer: Tokenizer, num_stories: int) -> None:
        self.rows = Rows(tokenizer, seed=0)
        self.texts = story_tokens(tokenizer, FIRST_EVALUATION_SEED, num_stories)
        self.reference = [log_probs(reference, text) for text in self.texts]  # [T, V] each

    def quality(self, decoder: Decoder) -> Quality:
        kl, same, nats, right = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor](), list[bool]()
        for text, expected in zip(self.texts, self.reference, strict=True):
            found = log_probs(decoder, text)
            guesses, targets = found.argmax(-1), torch.tensor(text[1:])
            kl.append(divergence(expected, found))
            same.append(guesses == expected.argmax(-1))
            nats.append(-found[:-1].gather(1, targets[:, None]))
            in_answer = torch.tensor(self.rows.weights(text, 2.0, 1.0)) > 1.0
            right += answers(targets, guesses[:-1], in_answer, self.rows.newline)
        means = [torch.cat(rows).double().mean() for rows in (kl, same, nats)]
        return Quality(means[0].item(), means[1].item(), means[2].exp().item(), sum(right) / len(right))


def story_tokens(tokenizer: Tokenizer, first_seed: int, count: int) -> list[list[int]]:
    texts = (document(tell(seed)) for seed in range(first_seed, first_seed + count))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def after_training(scheme: Scheme, judge: Judge, texts: Texts) -> dict[str, Quality]:
    """What round to nearest, AWQ and GPTQ leave of the bundled model."""
    found = {}
    for method in ("rtn", "awq", "gptq"):
        decoder = dense_decoder(PATH)
        quantise_decoder(decoder, scheme, method, texts)
        found[method] = judge.quality(decoder)
    return found


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the quantised model; it must not exist, or be empty.")],
    scheme: Annotated[str, typer.Option(help=f"Bits of the weights: {', '.join(BITS)}.")] = "w2a16",
    group_size: Annotated[int, typer.Option(help="Columns that share a scale.")] = 32,
    symmetric: Annotated[bool, typer.Option(help="Without zero points.")] = False,
    rate: Annotated[float, typer.Option(help="Learning rates as a factor of those that `train` uses.")] = 0.1,
    seed: Seed = 0,
    steps: Steps = 600,
    batch_tokens: BatchTokens = 1600,
    threads: Threads = 2,
    precision: Products = Precision.bfloat16,
    stories: Annotated[int, typer.Option(help="Unseen stories to measure on.", min=1)] = 30,
    figures: Annotated[Path, typer.Option(help="Folder for the numbers.")] = Path("results"),
) -> None:
    """Train the bundled storyteller with quantised weights (QAT), write it, and compare it with other methods."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"{out}: exists already")
    grid = scheme_of(scheme, group_size, symmetric=symmetric)
    torch.set_num_threads(threads)
    machine, start = describe_machine(), time.perf_counter()
    tokenizer = Tokenizer.from_file(str(PATH / "tokenizer.json"))
    teacher = Qwen3ForCausalLM.from_pretrained(PATH, dtype=torch.float32).eval()
    model = fake_quantised(Qwen3ForCausalLM.from_pretrained(PATH, dtype=torch.float32), grid)
    log = fit(
        model,
        tokenizer,
        [(steps, Mix(drills=0.0, packed=0.02, headless=0.2))],
        out,
        seed,
        batch_tokens,
        decay_steps=0.8 * steps,
        log_every=50,
        loss_of=distance_from(teacher),
        precision=precision,
        rate=rate,
        save=partial(export_quantised, scheme=grid),
    )
    seconds = time.perf_counter() - start
    judge = Judge(dense_decoder(PATH), tokenizer, stories)
    texts = story_tokens(tokenizer, FIRST_CALIBRATION_SEED, NUM_CALIBRATION)
    found = {"float": judge.quality(dense_decoder(PATH)), **after_training(grid, judge, texts)}
    found["qat"] = judge.quality(load_decoder(out, torch.float32))
    show(found)
    options = f"--scheme {scheme} --group-size {group_size} --rate {rate} --seed {seed} --steps {steps}"
    options += f" --batch-tokens {batch_tokens} --threads {threads} --precision {precision.value} --stories {stories}"
    report = {
        "command": f"python -m paged_infer.storyteller.training.qat OUT {options}{' --symmetric' * symmetric}",
        "bits_per_weight": grid.bits_per_weight(group_size),
        "training_seconds": round(seconds),
        "num_tokens": sum(map(len, judge.texts)),
        "machine": machine,
        "methods": {name: asdict(quality) for name, quality in found.items()},
        "log": log,
    }
    figures.mkdir(parents=True, exist_ok=True)
    (figures / f"storyteller_qat_{scheme}.json").write_text(json.dumps(report, indent=1) + "\n")


def show(found: dict[str, Quality]) -> None:
    """Print a line for each method."""
    print(f"{'method':8}{'KL':>10}{'same top':>10}{'perplexity':>12}{'recall':>8}")
    for name, one in found.items():
        print(f"{name:8}{one.kl:10.5f}{one.same_top:10.3f}{one.perplexity:12.3f}{one.recall:8.3f}")


if __name__ == "__main__":
    run_command(main)
