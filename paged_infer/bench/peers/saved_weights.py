"""The weights of an engine as a checkpoint that peers load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def save_for_peers(llm: Any, parent: Path) -> str:
    """A folder with the weights of ``llm``: its own; random ones, or those of a GGUF file, are saved as a checkpoint
    with a tokenizer of one word.

    Peers that take token ids still want to load a tokenizer.
    """
    if llm.engine.config.load_format != "dummy" and llm.folder.is_dir():
        return str(llm.folder)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from paged_infer.model.loading.checkpoint import config_dict
    from paged_infer.model.loading.load import checkpoint_views
    from paged_infer.model.loading.safetensors import write_tensors

    folder = parent / llm.folder.name.removesuffix(".gguf")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_dict(llm.folder)), encoding="utf-8")
    tensors = {name: view.cpu() for name, view in checkpoint_views(llm.engine.decoder).items()}
    write_tensors(folder / "model.safetensors", tensors)
    words = Tokenizer(models.WordLevel({"<|end|>": 0}, unk_token="<|end|>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>").save_pretrained(folder)
    return str(folder)
