"""Writes a trained storyteller as a Hugging Face folder, and the picture of its training."""

import json
import os
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedModel

from paged_infer.model.loading.safetensors import write_tensors
from paged_infer.storyteller.stories.grammar import END
from paged_infer.storyteller.training.vocabulary import CHAT_TEMPLATE, save_tokenizer

TIED = "lm_head.weight"  # to the embedding, so it is not stored


BLUE, ORANGE, INK = "#2f6f9f", "#e0a458", "#22303c"  # of viz.style, which is above this room


def export(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    folder: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    chat_template: Path = CHAT_TEMPLATE,
) -> None:
    """Write config, weights and tokenizer to `folder`; each file is replaced atomically.

    The weights are `tensors`, by default those of the model, rounded to bfloat16. config.json still names float32, so
    that engines compute in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = tokenizer.token_to_id(END)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        draft = Path(name)
        if tensors is None:
            own = {key: value.to(torch.bfloat16) for key, value in model.state_dict().items() if key != TIED}
            model.save_pretrained(draft, state_dict=own)  # each expert's matrices on their own, as engines read them
        else:
            stored = {key: value for key, value in tensors.items() if key != TIED}
            write_tensors(draft / "model.safetensors", stored)
            model.config.save_pretrained(draft)
        config = json.loads((draft / "config.json").read_text())
        config |= {"architectures": [type(model).__name__], "dtype": "float32"}
        if "num_local_experts" in config:
            config["num_experts"] = config["num_local_experts"]  # which older versions of transformers, and vLLM, read
        (draft / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        GenerationConfig(eos_token_id=end, pad_token_id=end).save_pretrained(draft)
        save_tokenizer(tokenizer, draft, chat_template)
        for file in sorted(draft.iterdir()):
            file.chmod(0o644)
            os.replace(file, folder / file.name)


def plot(log: list[dict[str, float]], path: Path) -> None:
    """The loss (left axis) and the recall of unseen facts (right axis) over the tokens trained on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    millions = [entry["tokens"] / 1e6 for entry in log]
    with plt.style.context("default"):
        figure, left = plt.subplots(figsize=(7, 3), dpi=100, layout="constrained", facecolor="white")
        left.plot(millions, [entry["loss"] for entry in log], color=BLUE)
        left.set(yscale="log", xlim=(0, None))
        left.set_yticks([0.3, 1, 3], ["0.3", "1", "3"])
        left.minorticks_off()
        left.set_ylabel("loss (nats per token)", color=BLUE, fontsize=9)
        left.set_xlabel("tokens trained on (millions)", fontsize=9)
        right = left.twinx()
        right.plot(millions, [100 * entry["recall"] for entry in log], color=ORANGE)
        right.set_ylim(0, 102)
        right.set_ylabel("answers right (%)", color=ORANGE, fontsize=9)
        for axes in (left, right):
            axes.spines[["top", "left", "right"]].set_visible(False)
            axes.tick_params(length=0, labelsize=8.5)
        left.set_title("the storyteller: loss, and questions of unseen stories", fontsize=9.5, color=INK)
        left.grid(color="#d9dee5", linewidth=0.8)
        figure.savefig(path, dpi=200)
        plt.close(figure)
