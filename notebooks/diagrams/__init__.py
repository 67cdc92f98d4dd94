"""The diagrams of the course, drawn by one script: ``python -m notebooks.diagrams`` in the repository's root.

A chapter shows one as ``![words](diagrams/NAME.svg)``. They lie next to the chapters because JupyterLab, started in
this folder, serves nothing above it.
"""

from __future__ import annotations

from pathlib import Path

from .batching import continuous_batching, request_life
from .caches import block_table, ladder
from .engine import engine_step, threads, vllm_map
from .model import attention_heads, decoder_layer, online_softmax

FOLDER = Path(__file__).parent
DRAWINGS = {
    draw.__name__: draw
    for draw in (
        ladder,
        decoder_layer,
        attention_heads,
        online_softmax,
        block_table,
        request_life,
        continuous_batching,
        engine_step,
        threads,
        vllm_map,
    )
}


def stored(name: str) -> Path:
    return FOLDER / f"{name}.svg"
