"""``bench control``: what is timed is a full house over a full pool, whatever the pool's size."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from paged_infer.bench.scheduling.scheduler_cost import FULL, FullScheduler, measure_lookups, measure_pools
from paged_infer.cli import app
from paged_infer.control.blocks import hashing as block_hash

POOLS = (500, 5_000)


@pytest.fixture(scope="module")
def pools():
    return measure_pools(POOLS, num_seqs=16, num_steps=60, seed=0)


def test_pools_of_every_size_meet_the_same_traffic(pools):
    assert [pool.num_blocks for pool in pools] == [*POOLS]
    counts = {(pool.evictions_per_step, pool.hit_tokens_per_step, pool.preemptions) for pool in pools}
    assert len(counts) == 1
    evictions, hits, preemptions = counts.pop()
    assert evictions > 0 and hits > 0 and preemptions == 0


def test_pools_are_as_full_as_they_are_said_to_be(pools):
    assert all(abs(pool.held - FULL) < 0.15 for pool in pools)
    assert pools[1].held == pytest.approx(FULL, abs=0.01)


def test_every_block_taken_of_a_full_pool_evicts_one():
    """Until the first sequences end, all that is free is cached."""
    house = FullScheduler(2000, 16, 0, traced=False)
    num_free = house.scheduler.manager.pool.num_free
    house.step()
    num_taken = num_free - house.scheduler.manager.pool.num_free
    assert house.report_counts()[0] == num_taken > 16


def test_all_places_are_taken_in_every_step_and_the_books_are_in_order():
    house = FullScheduler(2000, 16, 0, traced=True)
    house.open()
    for _ in range(50):
        house.step()
        assert house.scheduler.trace.steps[-1].num_running == 16
    resident = house.scheduler.manager.table(-1)
    held = {s.sequence_id: s.num_computed_tokens for s in house.scheduler.running}
    house.scheduler.manager.check_integrity({**held, -1: len(resident) * 16})


def test_a_cached_prompt_is_found_whole_and_each_of_its_blocks_is_hashed_once(monkeypatch):
    hashed: list[bytes] = []
    blake2b = block_hash.blake2b

    def counted(data, **options):
        hashed.append(data)
        return blake2b(data, **options)

    monkeypatch.setattr(block_hash, "blake2b", counted)
    reports = measure_lookups((64, 4096), repeats=5)
    assert [one.num_tokens for one in reports] == [64, 4096]
    assert all(one.first_us > 0 and one.next_block_us > 0 for one in reports)
    block_bytes = 32 + 16 * 8  # the hash before it, and its tokens
    num_stored, num_of_each = 4096 // 16 + 1, [64 // 16 + 1, 4096 // 16 + 1]
    assert sum(len(data) == block_bytes for data in hashed) == num_stored + 5 * sum(num_of_each)


def test_the_command_writes_its_numbers(tmp_path):
    options = ["--num-seqs", "8", "--num-steps", "5", "--pool", "40", "--pool", "400", "--step-ms", "5"]
    result = CliRunner().invoke(app, ["bench", "control", *options, "--figures", str(tmp_path)])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "bench-control.json").read_text())
    assert [pool["num_blocks"] for pool in report["pools"]] == [40, 400]
    assert "largest pool / smallest" in result.output


def test_a_pool_too_small_for_the_house_is_one_clear_error(tmp_path):
    options = ["--num-seqs", "8", "--pool", "20", "--step-ms", "5"]
    result = CliRunner().invoke(app, ["bench", "control", *options, "--figures", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output.startswith("error: ") and "20 blocks" in result.output and "27" in result.output
