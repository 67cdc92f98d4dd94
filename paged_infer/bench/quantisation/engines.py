"""What quantisation gains: the speed of quantised engines in processes that take turns, and the memory of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from paged_infer.bench.peers.other_engines import BLOCK_SIZE, PeerOptions, engine_peers
from paged_infer.bench.side_by_side.llama_cpp import NAME, LlamaOptions, llama_server
from paged_infer.bench.side_by_side.turns import PeerResult, take_turns
from paged_infer.bench.workloads import Workload, one_request, random_ids
from paged_infer.config import EngineOptions
from paged_infer.model.config import ModelConfig

REQUESTS = (1, 4, 16, 32)
PROMPT_TOKENS = 512  # tokens of the step in which memory is measured, which takes the most
Engines = Mapping[str, EngineOptions]


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of one engine's process.

    Attributes:
        peak_bytes: its peak resident memory, without the pool.
        block_bytes: bytes of a block of the pool.
        num_blocks: how many blocks fit into the given memory beside ``peak_bytes``.
    """

    peak_bytes: int
    block_bytes: int
    num_blocks: int


def workloads(vocab_size: int, scale: float, seed: int) -> dict[str, Workload]:
    """The workload of each number of requests: one of 128 tokens in and out, or several of 16 to 128.

    ``scale`` multiplies all lengths.
    """
    short, long = (max(2, round(n * scale)) for n in (16, 128))
    many = {str(n): random_ids(vocab_size, n, short, long, seed) for n in REQUESTS[1:]}
    return {"1": one_request(vocab_size, long, long, seed), **many}


def peer_options(
    folder: Path, load_format: str, given: Mapping[str, Workload], limit: int, threads: int
) -> PeerOptions:
    """The options of engines whose pool holds every workload in ``given``.

    Raises:
        ValueError: a request is longer than ``limit``, the model's maximal length in tokens.
    """
    lengths = [
        [len(prompt) + (one.max_tokens or 0) for prompt, one in zip(w.prompts, w.params, strict=True)]
        for w in given.values()
    ]
    if (longest := max(map(max, lengths))) > limit:
        raise ValueError(f"a sequence of {longest} tokens exceeds the model's limit of {limit}; lower --scale")
    pool_tokens = max(sum(one) + BLOCK_SIZE * len(one) for one in lengths)
    engine: EngineOptions = {"load_format": load_format}
    return PeerOptions(str(folder), "float32", longest, max(REQUESTS), 0.5, threads, pool_tokens, engine)


def weigh(
    options: PeerOptions, engines: Engines, config: ModelConfig, memory_bytes: int, left_out: dict[str, str]
) -> dict[str, Memory]:
    """The memory of each engine, measured by loading it alone and computing one prompt.

    Args:
        memory_bytes: what a process may use, to count the blocks that fit.
        left_out: gets the reason for each engine that cannot run.
    """
    found = {}
    longest = min(PROMPT_TOKENS, config.max_position_embeddings)
    request = one_request(config.vocab_size, longest - 2, 2, seed=0)
    for name, its in engines.items():
        alone = replace(options, max_model_len=longest, pool_tokens=longest, engine={**options.engine, **its})
        try:
            with engine_peers(["paged"], alone) as systems:
                run = systems["paged"](request)
        except ValueError as error:
            left_out[name] = str(error)
            continue
        if run.peak_bytes is not None:  # there is a /proc
            block_bytes = run.kv_bytes_per_token * BLOCK_SIZE
            peak_bytes = run.peak_bytes - run.kv_bytes_per_token * longest
            found[name] = Memory(peak_bytes, block_bytes, max(0, memory_bytes - peak_bytes) // block_bytes)
    return found


def measure_speed(
    options: PeerOptions,
    engines: Engines,
    files: Mapping[str, Path],
    given: Mapping[str, Workload],
    repeats: int,
    on_run: Callable[[str], None],
    left_out: dict[str, str],
) -> dict[str, PeerResult]:
    """Interleaved runs of all engines, and of llama.cpp with each of ``files``, by the names of their types.

    ``on_run`` is called after each run; ``left_out`` gets the reason for each engine that cannot run.
    """
    longest = options.max_model_len
    with ExitStack() as stack:
        systems = {}
        for name, its in engines.items():
            if name not in left_out:
                peer = replace(options, engine={**options.engine, **its})
                systems[name] = stack.enter_context(engine_peers(["paged"], peer))["paged"]
        for kind, file in files.items():
            llama = LlamaOptions(file, options.threads, options.max_num_seqs, longest, longest)
            name = f"{NAME} {kind}"
            try:
                systems[name], _ = stack.enter_context(llama_server(llama))
            except ValueError as error:
                left_out[name] = str(error)
        return take_turns(systems, given, repeats, on_run, left_out.__setitem__)
