"""What the engine is compared with, under the names that a command takes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from paged_infer.bench.metrics import System
from paged_infer.bench.peers.other_engines import MODULES, PeerOptions, check_importable, engine_peers
from paged_infer.bench.peers.saved_weights import save_for_peers
from paged_infer.llm import LLM

# Short names, and the names in tables and pictures.
TRANSFORMERS = {
    "generate": "transformers",
    "static": "transformers static",
    "generate_batch": "transformers generate_batch",
}
ENGINES = tuple(MODULES)
NAMES = (*TRANSFORMERS, *ENGINES)


def check_peers(names: list[str]) -> None:
    """Raises ValueError for a name that is not known, or an engine that is not installed."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"peer {', '.join(unknown)} is not known; known: {', '.join(NAMES)}, none")
    check_importable([name for name in names if name in ENGINES])


@contextmanager
def open_peers(names: list[str], llm: LLM, memory_share: float) -> Iterator[dict[str, System]]:
    """The peers, on the weights of ``llm``, in the order of ``names``.

    Args:
        memory_share: of a GPU's memory, for each of the other engines.

    Raises:
        ValueError: as ``check_peers``, or an engine did not start.
    """
    check_peers(names)
    systems: dict[str, System] = {}
    with ExitStack() as stack:
        if shown := [TRANSFORMERS[name] for name in names if name in TRANSFORMERS]:
            from paged_infer.bench.peers.transformers_peers import transformers_peers

            found = transformers_peers(llm)
            systems |= {name: found[name] for name in shown}
        if engines := [name for name in names if name in ENGINES]:
            parent = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            engine = llm.engine
            options = PeerOptions(
                save_for_peers(llm, parent),
                str(engine.decoder.dtype).removeprefix("torch."),
                engine.memory.max_model_len,
                engine.config.max_num_seqs,
                memory_share,
            )
            systems |= stack.enter_context(engine_peers(engines, options))
        yield systems
