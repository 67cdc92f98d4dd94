"""What ``paged-infer info`` shows: the model and its memory, each number beside its formula."""

from __future__ import annotations

from rich.table import Table

from paged_infer.bench.machine import describe_machine, machine_line
from paged_infer.llm import LLM

MIB = 2**20


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
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", value)
    return table
