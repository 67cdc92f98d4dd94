"""``paged-infer bench peers``."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from paged_infer.bench.options import Repeats
from paged_infer.bench.report import save_report
from paged_infer.bench.speed.cli import errors, progress
from paged_infer.cli_options import RESULTS, Figures, Model, open_llm, with_option_groups

DTYPES = ("float32", "bfloat16")


@with_option_groups
def peers(
    model: Model = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="transformers, generate_batch, vllm or llama.cpp; may be repeated. Default: those here."),
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: float32 and bfloat16.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="llama.cpp's file. Default: the model, if it is one.")] = None,
    scale: Annotated[float, typer.Option(help="Factor of all lengths.", min=0.01)] = 1.0,
    threads: Annotated[int | None, typer.Option(help="Threads of each engine. Default: torch's.", min=1)] = None,
    repeats: Repeats = 3,
    seed: Annotated[int, typer.Option(help="Seed of the random token ids and lengths.")] = 0,
    figures: Figures = RESULTS,
) -> None:
    """The engine beside others on a CPU, with the same weights and token ids: a: one request, 128 tokens in and 128
    out; b: 32 requests of 16..128 in and out; c: the first token after a prompt of 1,500. And each one's peak memory.

    llama.cpp decodes its file as it is stored, whatever --dtype is. A peer that cannot run is named and left out.
    """
    import torch

    from paged_infer.bench.peers.other_engines import PROCESSES, PeerOptions, engine_peers, is_installed
    from paged_infer.bench.peers.saved_weights import save_for_peers
    from paged_infer.bench.side_by_side.llama_cpp import NAME, SERVER, LlamaOptions, llama_benches, llama_server
    from paged_infer.bench.side_by_side.turns import PeersReport, print_peers, take_turns, workloads
    from paged_infer.execution.machine import describe_machine

    known = ("transformers", "generate_batch", "vllm", NAME)
    with errors(), ExitStack() as stack:
        if unknown := [name for name in peer or () if name not in known]:
            raise ValueError(f"peer {', '.join(unknown)} is not known; known: {', '.join(known)}")
        if unknown := [name for name in dtype or () if name not in DTYPES]:
            raise ValueError(f"dtype={', '.join(unknown)}: must be float32 or bfloat16")
        usual = [name for name in known if is_installed(name) or (name == NAME and shutil.which(SERVER))]
        chosen, machine, left_out = peer or usual, describe_machine(), dict[str, str]()
        threads, versions = threads or torch.get_num_threads(), dict[str, str | None]()
        machine |= {"torch_threads": threads, "versions": versions}
        parent = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        llm = open_llm(model, dtype="float32", device="cpu", num_blocks=1)
        given = workloads(llm.engine.model_config.vocab_size, scale, seed)
        folder, name, file = save_for_peers(llm, parent), llm.name, gguf or llm.folder
        limit = llm.engine.model_config.max_position_embeddings
        del llm
        lengths = {
            key: [len(prompt) + (one.max_tokens or 0) for prompt, one in zip(w.prompts, w.params, strict=True)]
            for key, w in given.items()
        }
        longest = max(map(max, lengths.values()))
        if longest > limit:
            raise ValueError(f"a sequence of {longest} tokens exceeds the model's limit of {limit}; lower --scale")
        slots = len(lengths["b"])
        pool_tokens = max(map(sum, lengths.values())) + 16 * slots  # and a block that is not full, for each
        systems = {}
        for kind in dtype or DTYPES:
            options = PeerOptions(folder, kind, longest, slots, 0.5, threads, pool_tokens)
            for one in ("paged", *(one for one in PROCESSES if one in chosen)):
                try:
                    systems[f"{one} {kind}"] = stack.enter_context(engine_peers([one], options))[one]
                    versions[one] = is_installed(one)
                except ValueError as error:
                    left_out[f"{one} {kind}"] = str(error)
        own_benches = {}
        if NAME in chosen:
            llama = LlamaOptions(file, threads, slots, longest, max(lengths["b"]))
            try:
                if not file.is_file():
                    raise ValueError(f"llama.cpp needs a GGUF file, and {file.name} is none: name one with --gguf")
                systems[f"{NAME} {file.name}"], versions[NAME] = stack.enter_context(llama_server(llama))
            except ValueError as error:
                left_out[NAME] = str(error)
        with progress(repeats * len(systems) * len(given)) as advance:
            results = take_turns(systems, given, repeats, advance, left_out.__setitem__)
        stack.close()  # llama.cpp's benches run alone
        if NAME in chosen and NAME not in left_out:
            own_benches = llama_benches(llama, len(given["a"].prompts[0]), len(given["a"].prompts[0]))
        report = PeersReport(
            name,
            {key: one.name for key, one in given.items()},
            {key: sum(params.max_tokens or 0 for params in one.params) for key, one in given.items()},
            results,
            left_out,
            own_benches,
            machine,
        )
    print_peers(report)
    save_report(report, figures / "bench-peers.json")
