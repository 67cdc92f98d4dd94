"""Files that a prediction reads: workloads, operator tables, records of a real server. What is wrong is named."""

from __future__ import annotations

import json

import pytest

from paged_infer.control.step import ScheduledSequence, ScheduledStep
from paged_infer.simulation.operator_tables import OperatorTable
from paged_infer.simulation.records import errors, read_records
from paged_infer.simulation.times import TokenTimes
from paged_infer.simulation.workloads import LIKE, WorkloadRequest, at_rate, dataset_like, read_workload


def step(*sequences: tuple[int, int]) -> ScheduledStep:
    return ScheduledStep(1, [ScheduledSequence(i, [0] * n, b, [], None) for i, (b, n) in enumerate(sequences)])


def test_a_workload_is_read_in_the_order_of_arrival(tmp_path):
    path = tmp_path / "workload.json"
    path.write_text(json.dumps([{"at": 2, "in": 3, "out": 4}, {"at": 0.5, "in": 2, "out": 1, "ids": [7, 8]}]))
    first, second = read_workload(path)
    assert (first, second) == (WorkloadRequest(0.5, 2, 1, (7, 8)), WorkloadRequest(2, 3, 4))
    assert first.token_ids(0) == [7, 8] and len(set(second.token_ids(1) + second.token_ids(2))) == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"at": 0, "in": 3}, "entry 1: lacks out"),
        ([1, 2, 3], "entry 1: must be an object"),
        ({"at": -1, "in": 3, "out": 4}, "entry 1: at=-1: must be a number of seconds >= 0"),
        ({"at": 1e10, "in": 3, "out": 4}, r"entry 1: at=1e\+10|entry 1: at=10000000000\.0"),
        ({"at": "now", "in": 3, "out": 4}, "entry 1: at='now'"),
        ({"at": 0, "in": 0, "out": 4}, "entry 1: in=0: must be a number of tokens >= 1"),
        ({"at": 0, "in": 2, "out": 2.5}, r"entry 1: out=2\.5"),
        ({"at": 0, "in": 2, "out": 4, "ids": [1]}, "entry 1: ids: must be a list of in=2 token ids, not 1 of them"),
        ({"at": 0, "in": 2, "out": 4, "ids": [1, -1]}, "entry 1: ids: -1 is not a token id"),
    ],
)
def test_a_wrong_entry_is_named_with_its_file(tmp_path, entry, message):
    path = tmp_path / "workload.json"
    path.write_text(json.dumps([{"at": 0, "in": 1, "out": 1}, entry]))
    with pytest.raises(ValueError, match=f"workload .*workload.json, {message}"):
        read_workload(path)


@pytest.mark.parametrize("content", ["[]", "{}", "[", '"at"'])
def test_a_malformed_workload_is_refused(tmp_path, content):
    path = tmp_path / "workload.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"workload .*workload\.json"):
        read_workload(path)
    with pytest.raises(ValueError, match="nothing"):
        read_workload(tmp_path / "nothing")


def test_requests_like_a_data_set_come_at_their_rate():
    workload = dataset_like(LIKE["alpaca-like"], 2000, 8.0)
    assert workload == dataset_like(LIKE["alpaca-like"], 2000, 8.0)
    assert len(workload) / workload[-1].at_s == pytest.approx(8.0, rel=0.1)
    assert sum(one.num_prompt for one in workload) / 2000 == pytest.approx(19.31, rel=0.1)
    faster = at_rate(workload, 100.0)
    assert len(faster) / faster[-1].at_s == pytest.approx(100.0)
    for wrong in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="rate="):
            dataset_like(LIKE["alpaca-like"], 2, wrong)
        with pytest.raises(ValueError, match="rate="):
            at_rate(workload, wrong)
    with pytest.raises(ValueError, match="all arrive at 0 s"):
        at_rate([WorkloadRequest(0.0, 1, 1)], 1.0)


@pytest.fixture
def prefix(tmp_path) -> str:
    """A card where a token takes 1 us in a layer's product, a chunk 1 us a token, a decode 1 us for 1,000."""
    tables = {
        "dense": "layer,tokens,time_us\nproduct,1,1\nproduct,9,9\nlayernorm,1,1\nlayernorm,9,1\n"
        "embedding,1,5\nembedding,9,5\n",
        "per_sequence": "layer,sequences,time_us\nlm_head,1,10\nlm_head,4,10\n",
        "attention": "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n0,0,8,1000,8\n0,0,1,16,99\n16,0,8,16,99\n"
        "4,0,0,0,4\n4,100,0,0,8\n8,0,0,0,8\n8,100,0,0,16\n",
    }  # fmt: skip
    for kind, text in tables.items():
        (tmp_path / f"card-{kind}.csv").write_text(text)
    return str(tmp_path / "card")


def test_operator_times_add_up(prefix):
    table = OperatorTable.read(prefix, num_layers=2, step_overhead_s=1.0)
    layers = 2 * (3 + 2 * 1)  # three tokens, two norms
    decodes = 2 * 3 * 500 / 1000
    assert table.seconds(step(*[(499, 1)] * 3)) == pytest.approx(1 + 1e-6 * (layers + 5 + 10 + decodes))
    chunk = 2 * 6 * 1.5  # six tokens after fifty: between four and eight, and between 0 and 100
    assert table.seconds(step((50, 6))) == pytest.approx(1 + 1e-6 * (2 * (6 + 2) + 5 + 10 + chunk))
    assert not table.extrapolated


def test_what_the_tables_do_not_cover_grows_in_proportion_and_is_counted(prefix):
    table = OperatorTable.read(prefix, num_layers=1)
    inside = 1e-6 * (9 + 2 + 5 + 10 + 8 + 1)
    assert table.seconds(step((0, 8), (999, 1))) == pytest.approx(inside) and not table.extrapolated
    table.seconds(step((0, 16)))
    assert table.extrapolated == {"tokens of a step": 3, "tokens of a chunk": 1}
    table.seconds(step(*[(0, 1)] * 5))
    assert table.extrapolated["sequences of a step"] == 1


def test_missing_or_incomplete_tables_are_named(prefix, tmp_path):
    with pytest.raises(ValueError, match=r"operator tables .*none.*none-dense\.csv"):
        OperatorTable.read(str(tmp_path / "none"))
    (tmp_path / "card-per_sequence.csv").write_text("layer,time_us\nlm_head,1\n")
    with pytest.raises(ValueError, match=r"card-per_sequence\.csv: must have the columns sequences, time_us"):
        OperatorTable.read(prefix)
    (tmp_path / "card-per_sequence.csv").write_text("layer,sequences,time_us\nlm_head,1,nan\n")
    with pytest.raises(ValueError, match=r"card-per_sequence\.csv: .*time_us=nan"):
        OperatorTable.read(prefix)
    (tmp_path / "card-per_sequence.csv").write_text("layer,sequences,time_us\n")
    with pytest.raises(ValueError, match=r"card-per_sequence\.csv: has no rows"):
        OperatorTable.read(prefix)


def record(queued: float, first: float, last: float, num_output: int = 5) -> str:
    stamps = {"queued_ts": queued, "first_token_ts": first, "last_token_ts": last}
    return json.dumps({"input_toks": 3, "output_toks": num_output, **stamps})


def test_errors_are_signed_and_relative(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join([record(100, 101, 105), record(100, 102, 110), ""]))
    measured = read_records(path)
    assert measured[0] == TokenTimes(100, 3, [101, 105], 5)
    ours = [TokenTimes(0, 3, [0.5, 4.5], 5), TokenTimes(0, 3, [2, 12], 5)]
    found = errors(ours, measured)
    assert found["makespan"] == pytest.approx(12 / 10 - 1)
    assert found["ttft"]["mean"] == pytest.approx(1.25 / 1.5 - 1) and found["ttft"]["p99"] == pytest.approx(0)
    assert found["tpot"]["mean"] == pytest.approx(1.75 / 1.5 - 1)
    with pytest.raises(ValueError, match="the records are of 2 requests"):
        errors(ours[:1], measured)


def test_a_malformed_record_is_named_by_its_line(tmp_path):
    path = tmp_path / "requests.jsonl"
    for line in ("{}", "[", record(1, 2, 3).replace("1", "null")):
        path.write_text(record(1, 2, 3) + "\n" + line)
        with pytest.raises(ValueError, match=r"requests\.jsonl, line 2"):
            read_records(path)
    for wrong in (record(3, 2, 4), record(1, 1, 4), record(1, 3, 2), record(1, 2, 2), record(1, 2, float("nan")),
                  record(1, 2, 3, num_output=0)):  # fmt: skip
        path.write_text(record(1, 2, 3) + "\n" + wrong)
        with pytest.raises(ValueError, match=r"requests\.jsonl, line 2: .*: tokens must be numbers >= 1"):
            read_records(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no requests"):
        read_records(path)
