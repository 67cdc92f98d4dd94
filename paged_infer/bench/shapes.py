"""Models by their shape alone: a config.json, for measurements that need a size and no trained weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paged_infer.simulation.shapes import SHAPES


@contextmanager
def folder_of(model: str | None, load_format: str) -> Iterator[str | None]:
    """What ``LLM`` takes for ``model``: a shape's name becomes a folder with its config.json, kept inside the block.

    Raises:
        ValueError: a shape's name without ``load_format="dummy"``: there are no weights to read.
    """
    if model not in SHAPES:
        yield model
        return
    if load_format != "dummy":
        raise ValueError(f"{model} is a shape without weights: add --load-format dummy")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / model
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(SHAPES[model], indent=1), encoding="utf-8")
        yield str(folder)
