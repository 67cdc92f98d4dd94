"""``paged-infer info``: the device, the model, its memory, and how good the storyteller is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from paged_infer.cli_options import Model, Without, open_llm, with_option_groups
from paged_infer.config import KV_CACHE_DTYPES, EngineConfig
from paged_infer.terminal import console, fail

if TYPE_CHECKING:
    from rich.table import Table

    from paged_infer.execution.memory_plan import MemoryPlan
    from paged_infer.execution.memory_profile import MemoryProfile
    from paged_infer.llm import LLM
    from paged_infer.model.config import ModelConfig

MIB = 2**20


@with_option_groups
def info(
    engine: Annotated[EngineConfig, Without(trace="the record would end with the command")],
    model: Model = None,
    stories: Annotated[
        int, typer.Option(help="Unseen stories to measure the storyteller's recall and perplexity on.", min=0)
    ] = 100,
    sampled: Annotated[
        int, typer.Option(help="Stories for the storyteller to write, at temperature 0.8; how many are right?", min=0)
    ] = 0,
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
        console.print(f"on {stories} stories: {_shares(scores['recall_by_kind'], ' ... ?')}", highlight=False)
    if llm.is_storyteller and sampled:
        with console.status("writing stories"):
            found = storyteller.sample_stories(llm, sampled)
        right = sum(one for one, _ in found.values())
        console.print(f"right in every word: {right} of {sampled} sampled stories: {_shares(found)}", highlight=False)


def _shares(counts: dict[str, tuple[int, int]], mark: str = "") -> str:
    return ", ".join(f"{kind}{mark} {right} of {asked}" for kind, (right, asked) in counts.items())


def profile_rows(profile: MemoryProfile, max_num_batched_tokens: int, max_num_seqs: int) -> dict[str, str]:
    """What a GPU's memory is used for, one row each; the last row is what is left for the pool."""
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
    """The bytes of the weights, and how they are quantised, if they are."""
    from paged_infer.model.quant.methods import few_bits

    decoder = llm.engine.decoder
    config, item_bytes, few = decoder.config, decoder.dtype.itemsize, few_bits(decoder.linears())
    if few is None:
        total = config.num_parameters * item_bytes
        return {"weights": f"{config.num_parameters:,} parameters x {item_bytes} bytes = {total / MIB:,.1f} MiB"}
    floats, own = config.num_parameters - few.num_weights, config.quantization
    how = f"{llm.engine.config.quantization}, while loading" if own is None else f"{own.method}, as stored"
    return {
        "weights": f"{floats:,} parameters x {item_bytes} bytes + {few.num_weights:,} quantised in"
        f" {few.num_bytes / MIB:,.1f} MiB",
        "quantization": f"{how}; linear layers: {'; '.join(few.kinds)}",
    }


def attention_row(llm: LLM) -> str:
    """The attention backend, and why it is a slow one, or which one "auto" would take."""
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
