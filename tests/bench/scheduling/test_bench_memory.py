"""``bench memory``: every slot is accounted for, and paging wastes as little as is said, by measurement."""

from __future__ import annotations

import subprocess
import sys
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from paged_infer.bench.scheduling.memory_waste import (
    PAPER_NUM_SLOTS,
    PAPER_SHARES,
    MemoryReport,
    PagedRun,
    measure_memory,
    measure_sharing,
    measure_strategies,
)
from paged_infer.bench.scheduling.reservations import RESERVATIONS, BuddyMemory, reserve_contiguously
from paged_infer.cli import app
from paged_infer.simulation.lengths import ALPACA, MAX_MODEL_LEN, SHAREGPT, RequestLengths

PARTS = ("tokens", "reserved", "internal", "external")


@pytest.fixture(scope="module")
def report() -> MemoryReport:
    return measure_memory(num_output_tokens=60_000, num_slots=4096, block_sizes=(1, 128))


def test_every_slot_has_one_lot(report):
    for dataset in report.datasets:
        for strategy in dataset.strategies:
            shares = [getattr(strategy, part) for part in PARTS]
            assert sum(shares) == pytest.approx(1)
            assert min(shares) >= 0
            assert strategy.tokens <= strategy.fill <= 1


def test_knowing_more_wastes_less(report):
    for dataset in report.datasets:
        shares = [strategy.tokens for strategy in dataset.strategies]
        assert [strategy.name for strategy in dataset.strategies] == ["max", "pow2", "oracle", "paged"]
        assert shares == sorted(shares)
        assert dataset["oracle"].internal == 0
        assert dataset["max"].fill < 0.4


@pytest.mark.parametrize(("dataset", "required"), [(SHAREGPT, 0.96), (ALPACA, 0.88)])
@pytest.mark.parametrize("seed", [0, 1])
def test_pages_in_use_hold_the_tokens_that_are_required(dataset, required, seed):
    use = PagedRun(dataset.draw(100_000, seed), PAPER_NUM_SLOTS, 16).use
    assert use.fill >= required
    assert use.shares["tokens"] >= required  # of all there is, not only of what is in use


def test_the_reservations_lie_where_the_paper_measured_them():
    """The same model of Orca, the same memory, lengths of the same means: within a few points of Figure 2."""
    requests = SHAREGPT.draw(200_000, 0)
    for name, ask in RESERVATIONS.items():
        shares = reserve_contiguously(requests, PAPER_NUM_SLOTS, ask).shares
        assert shares == pytest.approx(PAPER_SHARES[name], abs=0.05), name


def test_the_papers_memory_holds_seven_contexts_and_a_rest():
    use = reserve_contiguously(SHAREGPT.draw(30_000, 0), PAPER_NUM_SLOTS, RESERVATIONS["max"])
    assert use.mean_running == 7
    assert use.shares["external"] == pytest.approx(0.089, abs=0.0005)


def test_larger_blocks_hold_fewer_tokens_and_blocks_of_one_are_full(report):
    for dataset in report.datasets:
        fills = [*dataset.fill_by_block_size.values()]
        assert fills == sorted(fills, reverse=True)
        assert fills[0] == 1


def test_more_samples_share_more_and_one_shares_nothing(report):
    assert [(one.dataset, one.width) for one in report.sharing] == [
        (dataset.name, width) for dataset in (SHAREGPT, ALPACA) for width in (2, 4, 6)
    ]
    assert all(0 < one.saved < 1 - 1 / one.width for one in report.sharing)
    saved = [measure_sharing(ALPACA, width, 15_000, 4096, 16, 0).saved for width in (1, 2, 6)]
    assert 0 == saved[0] < saved[1] < saved[2]


def test_what_samples_share_is_the_full_blocks_of_their_prompt():
    """Two samples of 48 prompt tokens and one block of output each: three blocks of eight are saved while both run."""
    run = PagedRun([RequestLengths(48, 17, 2)] * 300, 4096, 16)
    assert 1 - run.held_blocks / run.table_blocks == pytest.approx(3 / 8, abs=0.01)


def test_the_same_seed_gives_the_same_numbers():
    def measured(seed):
        return measure_strategies(ALPACA.draw(20_000, seed), 4096, 16), measure_sharing(
            ALPACA, 2, 8_000, 4096, 16, seed
        )

    assert measured(3) == measured(3) != measured(4)


def test_a_report_survives_its_json(report, tmp_path):
    report.save(tmp_path / "memory.json")
    assert MemoryReport.read(tmp_path / "memory.json") == report


@pytest.mark.parametrize("dataset", [SHAREGPT, ALPACA])
def test_lengths_have_the_papers_means_and_fit_the_context(dataset):
    requests = dataset.draw(5_000_000, 0)
    assert mean(r.num_prompt for r in requests) == pytest.approx(dataset.prompt.mean, rel=0.03)
    assert mean(r.num_output for r in requests) == pytest.approx(dataset.output.mean, rel=0.03)
    assert min(min(r.num_prompt, r.num_output) for r in requests) >= 1
    assert max(r.num_stored for r in requests) < MAX_MODEL_LEN


@given(num_slots=st.integers(1, 300), wishes=st.lists(st.tuples(st.integers(1, 70), st.booleans()), max_size=60))
def test_a_buddy_hands_out_no_slot_twice_and_gets_all_of_them_back(num_slots, wishes):
    memory, chunks = BuddyMemory(num_slots), []
    for wish, frees in wishes:
        if frees and chunks:
            memory.free(chunks.pop(wish % len(chunks)))
        elif (start := memory.take(wish)) is not None:
            assert memory.size_of(start) >= wish
            chunks.append(start)
        taken = [slot for start in chunks for slot in range(start, start + memory.size_of(start))]
        assert len(taken) == len(set(taken)) == num_slots - memory.num_free
        assert all(0 <= slot < num_slots for slot in taken)
    for start in chunks:
        memory.free(start)
    assert memory.num_free == num_slots
    assert memory.take(1 << (num_slots.bit_length() - 1)) == 0  # merged again, into the largest chunk there was


def test_no_tensor_library_is_needed_to_count():
    code = "import sys, paged_infer.bench.scheduling.memory_waste; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--slots", "100"], ["100 slots", "2048"]),
        (["--slots", "3000", "--block-size", "1600"], ["3000 slots", "1600"]),
        (["--output-tokens", "500"], ["requests are too few", "15728"]),
    ],
)
def test_a_memory_that_cannot_be_measured_is_one_clear_error(options, words, tmp_path):
    result = CliRunner().invoke(app, ["bench", "memory", *options, "--figures", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output.startswith("error: ") and len(result.output.strip().splitlines()) == 1
    assert all(word in result.output for word in words)


def test_the_command_prints_the_papers_numbers_beside_ours(report, tmp_path, monkeypatch):
    monkeypatch.setattr("paged_infer.bench.scheduling.memory_waste.measure_memory", lambda *options: report)
    result = CliRunner().invoke(app, ["bench", "memory", "--figures", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "96.3%" in result.output and "20.4%" in result.output
    assert (tmp_path / "bench-memory.png").read_bytes().startswith(b"\x89PNG")
    assert MemoryReport.read(tmp_path / "bench-memory.json") == report
