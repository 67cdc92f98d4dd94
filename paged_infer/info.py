"""What ``paged-infer info`` shows: the model and its memory, each number beside its formula."""

from __future__ import annotations

from rich.table import Table

from paged_infer.config import EngineConfig
from paged_infer.execution.machine import describe_machine, machine_line
from paged_infer.execution.memory_profile import MemoryProfile
from paged_infer.llm import LLM

MIB = 2**20


def profile_rows(profile: MemoryProfile, config: EngineConfig) -> dict[str, str]:
    """Where a GPU's memory goes, line by line: what the pool could have is what the lines above it leave."""
    share = f"gpu_memory_utilization x total = {profile.gpu_memory_utilization:g} x {_mib(profile.total)}"
    return {
        "GPU memory": f"{share}, of {_mib(profile.free)} that were free: {_mib(profile.budget)}",
        "- weights": f"{_mib(profile.weights)}, measured",
        "- activations": f"{_mib(profile.activations)}, measured in a step of {config.max_num_batched_tokens:,} tokens",
        "- sampling": f"{_mib(profile.logits)}, measured on {config.max_num_seqs:,} rows of logits, sorted whole",
        "- graphs reserved": f"{_mib(profile.graphs)}: their largest step, measured, and an allowance for each graph",
        "= room for the pool": _mib(profile.room),
    }


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.1f} MiB"


def info_table(llm: LLM) -> Table:
    """Two columns: what it is, and how it comes about."""
    engine, config, memory = llm.engine, llm.engine.decoder.config, llm.engine.memory
    item_bytes = engine.decoder.dtype.itemsize
    block_bytes = memory.block_size * memory.kv_bytes_per_token
    pool_tokens = memory.num_blocks * memory.block_size
    rows = {
        "machine": machine_line(describe_machine()),
        "model": f"{llm.name} ({config.family}), {str(engine.decoder.dtype).removeprefix('torch.')} on {engine.device}",
        "weights": f"{config.num_parameters:,} parameters x {item_bytes} bytes"
        f" = {config.num_parameters * item_bytes / MIB:,.1f} MiB",
        "KV bytes a token": "2 x layers x kv_heads x head_dim x bytes"
        f" = 2 x {config.num_layers} x {config.num_kv_heads} x {config.head_dim} x {item_bytes}"
        f" = {memory.kv_bytes_per_token:,}",
        "block": f"{memory.block_size} tokens x {memory.kv_bytes_per_token:,} bytes = {block_bytes:,} bytes",
        "pool": f"{memory.num_blocks:,} blocks = {pool_tokens:,} tokens = {memory.pool_bytes / MIB:,.1f} MiB",
        "longest sequence": f"max_model_len = {memory.max_model_len:,} tokens;"
        f" {pool_tokens // memory.max_model_len:,} such sequences fit at once",
    }
    graphs = engine.runner.graphs
    if memory.profile is not None:
        rows |= profile_rows(memory.profile, engine.config)
    if graphs is not None:
        rows["graphs"] = (
            f"{len(graphs.sizes)}, for {graphs.sizes[0]:,} to {graphs.sizes[-1]:,} rows: {_mib(graphs.num_bytes)} taken"
        )
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", value)
    return table
