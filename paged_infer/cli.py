"""The command line: ``paged-infer compare | generate | chat | serve | info | eval | quantize | bench``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paged_infer.bench import cli as bench_cli
from paged_infer.bench.speed import cli as speed_cli
from paged_infer.cli_options import (
    Engine,
    EngineOfText,
    Model,
    ModelOption,
    Seed,
    Without,
    console,
    fail,
    failure_of,
    open_llm,
    quiet_libraries,
    show_error,
    show_stream,
    with_option_groups,
)
from paged_infer.config import KV_CACHE_DTYPES, EngineConfig
from paged_infer.evaluation.cli import evaluate
from paged_infer.params import SamplingParams
from paged_infer.server.cli import serve

if TYPE_CHECKING:
    from rich.table import Table

    from paged_infer.execution.memory_plan import MemoryPlan
    from paged_infer.execution.memory_profile import MemoryProfile
    from paged_infer.llm import LLM
    from paged_infer.model.config import ModelConfig

MIB = 2**20

app = typer.Typer(
    help="LLM inference, small enough to read and real enough to use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_cli.app, name="bench")
app.command()(serve)
app.command("eval")(evaluate)


@app.command()
@with_option_groups
def compare(
    engine: Engine,
    model: Model = None,
    num_prompts: Annotated[int, typer.Option(help="Number of requests, all submitted at the start.", min=1)] = 16,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate for each of them.", min=1)] = 128,
    seed: Seed = 0,
    figures: Annotated[Path, typer.Option(help="Folder for ladder.png and ladder.json.")] = Path("figures"),
) -> None:
    """Run the same prompts through the ladder's four baselines and transformers: same tokens, at what cost?

    Exits with status 1 if any of them generates different tokens.
    """
    try:
        llm = open_llm(model, **engine.options)
        from paged_infer.bench.peers.transformers_peers import transformers_baselines
        from paged_infer.bench.speed.baselines import our_baselines
        from paged_infer.bench.speed.ladder import run_ladder
        from paged_infer.bench.workloads import story_beginnings

        workload = story_beginnings(llm, num_prompts, max_tokens, seed)
        systems = {**our_baselines(llm), **transformers_baselines(llm)}
        with speed_cli.progress(len(systems)) as advance:
            save = speed_cli.save_to(figures, "ladder")
            report = run_ladder(llm, systems, workload, on_run=advance, save=save)
    except ValueError as error:
        fail(error)
    speed_cli.show(report, figures, "ladder")
    if not all(entry.is_right for entry in report.entries):
        raise typer.Exit(1)


@app.command()
@with_option_groups
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or more texts to continue.")],
    engine: EngineOfText,
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate for each prompt.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most probable tokens up to this probability.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End the text before this string; may be repeated.")] = None,
    seed: Seed = 0,
) -> None:
    """Continue each prompt. A single one is printed as it grows.

    Exits with status 1 if one of them failed; the reason is printed on standard error.
    """
    try:
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=stop or (), seed=seed
        )
        llm = open_llm(model, **engine.options)
        if len(prompts) == 1:
            growing = llm.stream(prompts[0], params)
            typer.echo(prompts[0], nl=False)
            outputs = [show_stream(growing)]
        else:
            outputs = llm.generate(prompts, params)
            for output in outputs:
                typer.echo(f"{output.prompt}{output.outputs[0].text}\n")
    except ValueError as error:
        fail(error)
    failures = {index: reason for index, output in enumerate(outputs) if (reason := failure_of(output))}
    for index, reason in failures.items():
        show_error(f"prompt {index}: {reason}")
    if failures:
        raise typer.Exit(1)


@app.command()
@with_option_groups
def chat(
    engine: EngineOfText,
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens in an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Seed = 0,
) -> None:
    """Chat with a model that has a chat template. The storyteller tells stories, and answers questions about them.

    Type /new to start a new conversation, Ctrl-D to quit.
    """
    try:
        llm = open_llm(model, **engine.options)
        stop = ["\nQ:"] if llm.is_storyteller else []  # otherwise it continues with the next question
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop)
        llm.chat_prompt([{"role": "user", "content": "hello"}])  # raises now if there is no template
    except ValueError as error:
        fail(error)
    if llm.is_storyteller:
        typer.echo("Try:  Tell me a story about Mia and a red key.    Then:  Where is the key?    (/new, Ctrl-D)")
    messages: list[dict[str, str]] = []
    for line in _lines():
        if line == "/new":
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        try:
            output = show_stream(llm.stream(llm.chat_prompt(messages), params), keep_space=False)
            reason = failure_of(output)
        except ValueError as error:  # too long, for example
            reason = str(error)
        if reason is not None:  # the conversation so far is kept
            messages.pop()
            show_error(reason)
            continue
        messages.append({"role": "assistant", "content": output.outputs[0].text})


def _lines() -> Iterator[str]:
    """The lines that the user types until the end of input, without empty ones."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


@app.command()
@with_option_groups
def info(
    engine: Annotated[EngineConfig, Without(trace="the record would end with the command")],
    model: Model = None,
    stories: Annotated[
        int, typer.Option(help="Unseen stories to measure the storyteller's recall and perplexity on.", min=0)
    ] = 100,
) -> None:
    """Show the device, the model, the KV memory per token, and how many blocks fit."""
    try:
        llm = open_llm(model, **engine.options)
        table = info_table(llm)
    except ValueError as error:
        fail(error)
    from paged_infer import storyteller

    console.print(table)
    if llm.is_storyteller and stories:
        with console.status("reading unseen stories"):
            scores = storyteller.evaluate(llm, stories)
        ratio = scores["perplexity"] / scores["grammar_perplexity"]
        console.print(
            f"recall of stated facts {scores['recall']:.1%}, perplexity {scores['perplexity']:.3f}: "
            f"{ratio:.3f} x what the grammar's own probabilities allow ({scores['grammar_perplexity']:.3f})"
        )
        kinds = (f"{kind} ... ? {right} of {asked}" for kind, (right, asked) in scores["recall_by_kind"].items())
        console.print(f"on {stories} stories: {', '.join(kinds)}", highlight=False)


@app.command()
def quantize(
    model: Annotated[
        str, typer.Argument(help="Local folder, GGUF file, hub id, smollm2, storyteller or storyteller-moe.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the quantised model; it must not exist, or be empty.")],
    scheme: Annotated[str, typer.Option(help="w4a16, w8a16, or w8a8, which rounds inputs, too.")] = "w4a16",
    method: Annotated[str, typer.Option(help="rtn, gptq, awq or smoothquant.")] = "rtn",
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale; default: 32 for w4a16, else a row.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="stories, or a text file; all methods but rtn, and --keep-wide, need one. The storyteller: stories."
        ),
    ] = None,
    keep_wide: Annotated[
        float, typer.Option(help="Share of the weights that may stay as they are, in the most sensitive layers.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the texts for calibration.", min=0)] = 0,
) -> None:
    """Write a model with weights of few bits, in compressed-tensors' format, which transformers loads, too."""
    from tqdm import tqdm

    from paged_infer.quantize import quantize as quantize_model

    quiet_libraries()
    bar = tqdm(unit="layer", leave=False, desc=method, disable=None)
    try:
        with bar:
            report = quantize_model(
                model,
                out,
                scheme=scheme,
                method=method,
                group_size=group_size,
                calibration=calibration,
                keep_wide=keep_wide,
                seed=seed,
                on_start=bar.reset,
                on_layer=bar.update,
            )
    except ValueError as error:
        fail(error)
    bits = 8 * report.quantised_bytes / report.num_quantised
    typer.echo(f"{report.num_quantised:,} weights in {_mib(report.quantised_bytes)}, {bits:.2f} bits each with scales")
    tied = "; the head is tied to the embedding, so it stays as it is" if report.is_tied else ", the head included"
    typer.echo(f"{report.num_parameters - report.num_quantised:,} other parameters are not quantised{tied}")
    if report.wide:
        typer.echo(f"kept wide: {', '.join(report.wide)}")


def profile_rows(profile: MemoryProfile, max_num_batched_tokens: int, max_num_seqs: int) -> dict[str, str]:
    """Where a GPU's memory goes, row by row; the last row is what the others leave for the pool."""
    share = f"gpu_memory_utilization x total = {profile.gpu_memory_utilization:g} x {_mib(profile.total)}"
    return {
        "GPU memory": f"{share}, of {_mib(profile.free)} that were free: {_mib(profile.budget)}",
        "- weights": f"{_mib(profile.weights)}, measured",
        "- activations": f"{_mib(profile.activations)}, measured in a step of {max_num_batched_tokens:,} tokens",
        "- sampling": f"{_mib(profile.logits)}, measured on {max_num_seqs:,} rows of logits, sorted whole",
        "- graphs reserved": f"{_mib(profile.graphs)}: their largest step, measured, and allowances",
        "= room for the pool": _mib(profile.available_kv_bytes),
    }


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.1f} MiB"


def _kv_product(config: ModelConfig, memory: MemoryPlan, item_bytes: int) -> str:
    """The bytes of a token in all layers, as factors."""
    if config.mla is not None:
        parts, width = "kv_lora_rank + qk_rope_head_dim", config.mla.cached_dim
        if memory.kv_cache_dtype in KV_CACHE_DTYPES:
            names = f"{memory.kv_cache_dtype}: layers x ({parts} + 4 of two scales)"
            return f"{names} = {config.num_layers} x ({width} + 4)"
        return f"layers x ({parts}) x bytes = {config.num_layers} x {width} x {item_bytes}"
    names, heads = "2 x layers x kv_heads x head_dim x bytes", config.num_kv_heads
    if memory.kv_cache_dtype in KV_CACHE_DTYPES:
        names = f"{memory.kv_cache_dtype}: 2 x layers x kv_heads x (head_dim + 2 of its scale)"
        return f"{names} = 2 x {config.num_layers} x {heads} x ({config.head_dim} + 2)"
    return f"{names} = 2 x {config.num_layers} x {heads} x {config.head_dim} x {item_bytes}"


def weight_rows(llm: LLM) -> dict[str, str]:
    """The bytes of the weights and, if some have few bits, which and how."""
    from paged_infer.model.quant.methods import few_bits

    decoder = llm.engine.decoder
    config, item_bytes, few = decoder.config, decoder.dtype.itemsize, few_bits(decoder.linears())
    if few is None:
        total = config.num_parameters * item_bytes
        return {"weights": f"{config.num_parameters:,} parameters x {item_bytes} bytes = {total / MIB:,.1f} MiB"}
    floats, own = config.num_parameters - few.num_weights, config.quantization
    how = f"{llm.engine.config.quantization}, while loading" if own is None else f"{own.method}, as stored"
    return {
        "weights": f"{floats:,} parameters x {item_bytes} bytes + {few.num_weights:,} of few bits in"
        f" {few.num_bytes / MIB:,.1f} MiB",
        "quantization": f"{how}; linear layers: {'; '.join(few.kinds)}",
    }


def attention_row(llm: LLM) -> str:
    """The attention backend; why it is a slow one, or that "auto" would take another."""
    from paged_infer.kernels.attention_backends import fastest_backend

    name, reason = llm.engine.attention_backend
    fastest = fastest_backend(llm.engine.device)
    if reason is not None:
        return f"{name}, which is slower: {reason}"
    return name if name == fastest else f'{name}, as asked for; "auto" takes {fastest}'


def info_table(llm: LLM) -> Table:
    """The model and its memory, each number with its formula."""
    from rich.table import Table

    from paged_infer.execution.machine import describe_machine, machine_line

    engine, config, memory = llm.engine, llm.engine.model_config, llm.engine.memory
    item_bytes = engine.decoder.dtype.itemsize
    block_bytes = memory.block_size * memory.kv_bytes_per_token
    pool_tokens = memory.num_blocks * memory.block_size
    rows = {
        "machine": machine_line(describe_machine()),
        "model": f"{llm.name} ({config.family}), {str(engine.decoder.dtype).removeprefix('torch.')} on {engine.device}",
        **weight_rows(llm),
        "attention": attention_row(llm),
        "KV bytes per token": f"{_kv_product(config, memory, item_bytes)} = {memory.kv_bytes_per_token:,}",
        "block": f"{memory.block_size} tokens x {memory.kv_bytes_per_token:,} bytes = {block_bytes:,} bytes",
        "pool": f"{memory.num_blocks:,} blocks = {pool_tokens:,} tokens = {memory.pool_bytes / MIB:,.1f} MiB",
        "longest sequence": f"max_model_len = {memory.max_model_len:,} tokens;"
        f" {pool_tokens // memory.max_model_len:,} such sequences fit at once",
    }
    graphs = engine.in_process.runner.graphs
    if memory.profile is not None:
        rows |= profile_rows(memory.profile, memory.max_num_batched_tokens, engine.config.max_num_seqs)
    if graphs is not None:
        rows["graphs"] = (
            f"{len(graphs.sizes)}, for {graphs.sizes[0]:,} to {graphs.sizes[-1]:,} rows: {_mib(graphs.num_bytes)} taken"
        )
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", value)
    return table


if __name__ == "__main__":
    app()
