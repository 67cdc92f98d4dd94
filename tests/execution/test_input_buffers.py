"""InputBuffers: what a decode step reads is where it was, says what the step says, and filling rows touch nothing."""

from __future__ import annotations

import torch

from paged_infer import SamplingParams
from paged_infer.control.sequence import PLACEHOLDER
from paged_infer.control.step import SamplingRow, ScheduledSequence
from paged_infer.execution.input_buffers import InputBuffers

BLOCK_SIZE = 4


def a_decode(sequence_id: int, token: int, computed: int, table: tuple[int, ...], **of_sample):
    row = SamplingRow(SamplingParams(temperature=0.5), 100 + sequence_id, 0, computed + 1, 1)
    for name, value in of_sample.items():
        setattr(row, name, value)
    return ScheduledSequence(sequence_id, (token,), computed, table, row)


def make_buffers(max_rows: int = 4, max_blocks: int = 5) -> InputBuffers:
    return InputBuffers(max_rows, max_blocks, 11, torch.float32, torch.device("cpu"))


def rows_of(buffers: InputBuffers, num_rows: int) -> dict[str, list[float]]:
    return {name: column[:num_rows].tolist() for name, column in buffers.columns.items()}


def test_each_row_says_what_its_sequence_says() -> None:
    buffers = make_buffers()
    sequences = [a_decode(7, 42, 9, (3, 1, 8), seed=-(2**63), sample_index=2), a_decode(8, PLACEHOLDER, 4, (6, 2))]
    buffers.fill(sequences, 2, BLOCK_SIZE, {7: 0, 8: 3})
    assert rows_of(buffers, 2) == {
        "token_ids": [42, PLACEHOLDER],
        "pending_row": [-1, 3],
        "positions": [9, 4],
        "slot_mapping": [8 * 4 + 1, 2 * 4],
        "seeds": [-(2**63), 108],
        "sample_indices": [2, 0],
        "sample_positions": [10, 5],
        "temperatures": [0.5, 0.5],
        "seq_lens": [10, 5],
    }
    assert buffers.block_tables[0, :3].tolist() == [3, 1, 8] and buffers.block_tables[1, :2].tolist() == [6, 2]
    assert buffers.query_start_loc.tolist() == [0, 1, 2, 3, 4]


def test_rows_that_fill_up_have_no_length_no_slot_and_a_token_of_the_vocabulary() -> None:
    buffers = make_buffers()
    assert buffers.columns["slot_mapping"].tolist() == [-1] * 4  # before anything was sent
    buffers.fill([a_decode(i, 10 + i, 9, (1, 2, 3)) for i in range(4)], 4, BLOCK_SIZE, {})
    for _ in range(2):  # both copies of the host
        buffers.fill([a_decode(0, 10, 9, (1, 2, 3))], 4, BLOCK_SIZE, {})
        rows = rows_of(buffers, 4)
        assert rows["slot_mapping"][1:] == rows["pending_row"][1:] == [-1] * 3
        for name in ("token_ids", "positions", "seq_lens", "temperatures", "seeds"):
            assert rows[name][1:] == [0] * 3, name


def test_a_table_that_changed_is_sent_again_and_one_that_did_not_is_there_still() -> None:
    buffers = make_buffers()
    same, first, second = (5, 6), (1, 2), (1, 9, 4)
    for computed, changing in ((4, first), (5, first), (6, first), (7, second), (8, second), (9, second)):
        sequences = [a_decode(0, 1, computed, changing), a_decode(1, 1, 5, same)]
        buffers.fill(sequences, 2, BLOCK_SIZE, {})
        assert buffers.block_tables[0, : len(changing)].tolist() == list(changing)
        assert buffers.block_tables[1, :2].tolist() == list(same)


def test_the_host_packs_a_step_beside_the_one_that_is_perhaps_being_fetched() -> None:
    buffers = make_buffers()
    memories = set()
    sent = []
    for host in buffers._hosts:
        memories.add(host.memory.data_ptr())
        host.mark_sent = lambda host=host: sent.append(host)
        host.wait = lambda host=host: sent.remove(host) if host in sent else None
    assert len(memories) == 2
    for step in range(4):
        buffers.fill([a_decode(0, step, 3, (1,))], 1, BLOCK_SIZE, {})
        # The copy of the step before is out while this one is packed; the one before that has been waited for.
        assert len(sent) == min(step + 1, 2)


def test_columns_begin_where_kernels_can_load_16_bytes_and_a_small_batch_is_a_short_copy() -> None:
    buffers = make_buffers(max_rows=3, max_blocks=7)
    starts = [column.data_ptr() - buffers._memory.data_ptr() for column in buffers.columns.values()]
    assert all(start % 128 == 0 for start in starts)
    buffers._memory.fill_(77)
    buffers.fill([a_decode(0, 5, 3, (1,))], 1, BLOCK_SIZE, {})
    assert buffers.block_tables.view(torch.uint8)[1:].eq(77).all()  # the tables behind the first were not sent
    assert buffers.num_bytes >= buffers._memory.numel() + buffers.logits.numel() * 4
