"""``paged-infer bench quantisation``."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from paged_infer.bench.options import BenchModel, Repeats
from paged_infer.bench.report import save_report
from paged_infer.bench.shapes import folder_of
from paged_infer.bench.side_by_side.cli import DTYPES
from paged_infer.bench.speed.cli import errors, progress
from paged_infer.cli_options import RESULTS, Figures, open_llm, with_option_groups

NAME = "bench-quantisation.json"


@with_option_groups
def quantisation(
    model: BenchModel = None,
    load_format: Annotated[str, typer.Option(help="dummy: random weights, whose quality is not measured.")] = "auto",
    schemes: Annotated[
        list[str] | None,
        typer.Option(
            help="w8a16, w4a16, w8a8, int4-g32-asym, int4-narrow, nf4 ...; may be repeated. Default: a list of 15."
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="rtn, gptq, awq or smoothquant; may be repeated. Default: the usual ones of each scheme."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale in schemes such as int4-g. Default: 32.", min=1)
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="stories, or a text file. Default: stories for the storyteller, texts of its own for other models."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text file to measure quality on. Default: unseen stories for the storyteller, texts of its own for "
            "other models."
        ),
    ] = None,
    num_texts: Annotated[
        int, typer.Option(help="Number of texts to measure quality on; at most 24 with --text.", min=1)
    ] = 30,
    quality: Annotated[bool, typer.Option(help="Measure quality, or keep the numbers of an earlier run.")] = True,
    speed: Annotated[bool, typer.Option(help="Measure speed, or keep the numbers of an earlier run.")] = True,
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: float32 and bfloat16.")] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="A further engine: its options as JSON; may be repeated.")
    ] = None,
    gguf: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file for llama.cpp, such as model-Q4_K.gguf; may be repeated. Default: Q8_0 and Q4_K_M of a GGUF "
            "model.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    memory: Annotated[float, typer.Option(help="GiB that a process may use, its pool included.", min=0.01)] = 2.0,
    scale: Annotated[float, typer.Option(help="Factor that multiplies the requests' lengths.", min=0.01)] = 1.0,
    threads: Annotated[int | None, typer.Option(help="Threads of each engine. Default: torch's.", min=1)] = None,
    repeats: Repeats = 3,
    seed: Annotated[int, typer.Option(help="Seed of the texts and the requests.")] = 0,
    figures: Figures = RESULTS,
) -> None:
    """Quantised weights on a CPU: what schemes and methods lose (KL to float32, top-1 agreement, perplexity, recall),
    and what the schemes with kernels gain: memory, and tokens per second with 1, 4, 16 and 32 requests.

    llama.cpp is measured, too: its quality if llama-cpp-python is installed, its speed if llama-server is on PATH.
    """
    import torch

    from paged_infer.bench.quantisation import llama
    from paged_infer.bench.quantisation.cases import read_cases, read_engines
    from paged_infer.bench.quantisation.engines import measure_speed, peer_options, weigh, workloads
    from paged_infer.bench.quantisation.quality import choose_texts, measure_cases
    from paged_infer.bench.quantisation.report import GIB, QuantisationReport, print_report, quantisation_figure
    from paged_infer.execution.machine import describe_machine

    with errors(), ExitStack() as stack:
        if unknown := [name for name in dtype or () if name not in DTYPES]:
            raise ValueError(f"dtype={', '.join(unknown)}: must be float32 or bfloat16")
        cases = read_cases(schemes or (), methods or (), group_size)
        machine, threads = describe_machine(), threads or torch.get_num_threads()
        machine["torch_threads"] = threads
        parent = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = stack.enter_context(folder_of(model, load_format))
        llm = open_llm(folder, dtype="float32", device="cpu", load_format=load_format)
        engines = read_engines(cases, dtype or DTYPES, engine or (), is_gguf=llm.folder.is_file())
        report = QuantisationReport(llm.name, machine).with_halves_of(figures / NAME)
        given_files = gguf or []
        if not given_files and llm.folder.is_file() and llama.is_importable():
            given_files = llama.requantise(llm.folder, parent)
        files = dict(zip(llama.names_of(given_files), given_files, strict=True))
        if quality and load_format != "dummy":
            report.texts, held_out, calibrating = choose_texts(llm, cases, text, calibration, num_texts, seed)
            with progress(len(cases)) as advance:
                report.quality, reference = measure_cases(llm.folder, cases, held_out, calibrating, advance)
                if llama.is_importable():
                    for name, file in files.items():
                        report.quality.append(llama.llama_quality(file, name, held_out, reference, threads))
                elif files:
                    print(f"left out: quality of {', '.join(files)}: llama-cpp-python is not installed")
        if speed:
            config = llm.engine.model_config
            given = workloads(config.vocab_size, scale, seed)
            options = peer_options(llm.folder, load_format, given, config.max_position_embeddings, threads)
            del llm
            report.speed_machine, report.left_out, report.memory_bytes = machine, {}, round(memory * GIB)
            report.memory = weigh(options, engines, config, report.memory_bytes, report.left_out)
            with progress(repeats * (len(engines) + len(files)) * len(given)) as advance:
                report.speed = measure_speed(options, engines, files, given, repeats, advance, report.left_out)
            report.workloads = {key: one.name for key, one in given.items()}
            report.output_tokens = {key: sum(p.max_tokens or 0 for p in one.params) for key, one in given.items()}
    print_report(report)
    save_report(report, figures / NAME, quantisation_figure if report.quality or report.speed else None)
