"""The inputs of a decode step in one contiguous buffer: filled on the host, sent in one copy, read by CUDA graphs.

    host, pinned, twice    [ token_ids | positions | slot_mapping | .. | seq_lens | block_tables ]
                                                   |  one copy, up to the last block table in use
    device, once           [ token_ids | positions | slot_mapping | .. | seq_lens | block_tables ]

A captured graph reads and writes the addresses that it was captured with, so its inputs and outputs stay where they are
for the engine's life. The host alternates between two copies: the device may still be reading the previous
step's while the next step is packed. A batch smaller than the graph is padded with rows of length 0 and slot -1. They
read and store nothing, and their tokens are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paged_infer.control.sequence import PLACEHOLDER
from paged_infer.control.step import SamplingRow, ScheduledSequence
from paged_infer.kernels.fused.sample import LARGEST

# One number per row. ``pending_row``: the row of the previous step that samples this row's token; -1: it is known.
COLUMNS = {
    "token_ids": torch.int64,
    "pending_row": torch.int64,
    "positions": torch.int64,
    "slot_mapping": torch.int64,
    "seeds": torch.int64,
    "sample_indices": torch.int64,
    "sample_positions": torch.int64,
    "temperatures": torch.float32,
    "seq_lens": torch.int32,
}
_ALIGNMENT_BYTES = 128  # kernels load 16 bytes at a time only from addresses known to be aligned


class InputBuffers:
    """Persistent tensors of decode steps of up to ``max_rows`` sequences, on ``device``.

    Args:
        max_blocks: length of the longest block table.
        vocab_size: V, the width of the logits.
        dtype: of the logits.
    """

    def __init__(
        self, max_rows: int, max_blocks: int, vocab_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.max_rows, self.max_blocks = max_rows, max_blocks
        self._memory = torch.zeros(_num_bytes(max_rows, max_blocks), dtype=torch.uint8, device=device)
        self.columns, self.block_tables = _views(self._memory, max_rows, max_blocks)
        for name in ("pending_row", "slot_mapping"):  # until the first step, all rows are padding
            self.columns[name].fill_(-1)
        # Every row has one query, padding included, so this never changes.
        self.query_start_loc = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self.sampled = torch.zeros(
            max_rows, dtype=torch.int64, device=device
        )  # by the previous step, then overwritten by this one
        self.logits = torch.zeros(max_rows, vocab_size, dtype=dtype, device=device)
        self._hosts = [_HostCopy(max_rows, max_blocks, device) for _ in range(2)]

    @property
    def num_bytes(self) -> int:
        """Bytes on the device."""
        tensors = (self._memory, self.query_start_loc, self.sampled, self.logits)
        return sum(x.numel() * x.element_size() for x in tensors)

    def fill(
        self, sequences: Sequence[ScheduledSequence], num_rows: int, block_size: int, last_rows: Mapping[int, int]
    ) -> None:
        """Send the inputs of a step of these sequences, padded to ``num_rows`` rows.

        Args:
            sequences: one token each, and a ``SamplingRow``.
            last_rows: by sequence id, the row of ``sampled`` that has its pending token.
        """
        host = self._hosts[0]
        self._hosts.reverse()
        host.wait()
        host.fill(sequences, num_rows, block_size, last_rows)
        length = _num_bytes(self.max_rows, self.max_blocks, num_rows)
        self._memory[:length].copy_(host.memory[:length], non_blocking=True)
        host.mark_sent()


class _HostCopy:
    """The same buffer on the host, as arrays, with an event for when the device has read it."""

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.memory = torch.zeros(_num_bytes(max_rows, max_blocks), dtype=torch.uint8, pin_memory=is_cuda)
        columns, tables = _views(self.memory, max_rows, max_blocks)
        self._columns: dict[str, Any] = {name: column.numpy() for name, column in columns.items()}
        self._tables = tables.numpy()
        # A table is a new object when it changes, so most rows need not be written again.
        self._written: list[Sequence[int] | None] = [None] * max_rows
        self._device = device
        self._sent = torch.cuda.Event() if is_cuda else None

    def wait(self) -> None:
        """Wait until its last copy to the device is done; usually it is, as another step was launched since."""
        if self._sent is not None:
            self._sent.synchronize()

    def mark_sent(self) -> None:
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self._device))

    def fill(
        self, sequences: Sequence[ScheduledSequence], num_rows: int, block_size: int, last_rows: Mapping[int, int]
    ) -> None:
        num = len(sequences)
        columns, tables = self._columns, self._tables
        samples = [s.sample for s in sequences if isinstance(s.sample, SamplingRow)]
        token_ids = [s.token_ids[0] for s in sequences]
        values = {
            "token_ids": token_ids,
            "pending_row": [
                last_rows[s.sequence_id] if t == PLACEHOLDER else -1 for s, t in zip(sequences, token_ids, strict=True)
            ],
            "positions": [s.num_computed_tokens for s in sequences],
            "seeds": [row.seed for row in samples],
            "sample_indices": [row.sample_index for row in samples],
            "sample_positions": [row.position for row in samples],
            "temperatures": [min(row.params.temperature, LARGEST) for row in samples],
        }
        for column in columns.values():
            column[num:num_rows] = 0
        for name in ("pending_row", "slot_mapping"):
            columns[name][num:num_rows] = -1
        for name, column_values in values.items():
            columns[name][:num] = column_values
        for row, sequence in enumerate(sequences):
            if self._written[row] is not sequence.block_table:
                tables[row, : len(sequence.block_table)] = sequence.block_table
                self._written[row] = sequence.block_table
        positions = columns["positions"][:num]
        columns["seq_lens"][:num] = positions + 1
        blocks = tables[np.arange(num), positions // block_size].astype(np.int64)
        columns["slot_mapping"][:num] = blocks * block_size + positions % block_size


def _num_bytes(max_rows: int, max_blocks: int, num_tables: int | None = None) -> int:
    """Bytes of all columns and of the first ``num_tables`` block tables."""
    columns = sum(_padded(max_rows * dtype.itemsize) for dtype in COLUMNS.values())
    return columns + (max_rows if num_tables is None else num_tables) * max_blocks * torch.int32.itemsize


def _views(memory: Tensor, max_rows: int, max_blocks: int) -> tuple[dict[str, Tensor], Tensor]:
    """Views of ``memory``: columns by name [max_rows], and block tables int32 [max_rows, max_blocks]."""
    columns, at = {}, 0
    for name, dtype in COLUMNS.items():
        columns[name] = memory[at : at + max_rows * dtype.itemsize].view(dtype)
        at += _padded(max_rows * dtype.itemsize)
    return columns, memory[at:].view(torch.int32).view(max_rows, max_blocks)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
