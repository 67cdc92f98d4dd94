"""`bench kernels` finds a wrong kernel before it times any, names every peer that is missing, and reports only runs."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import typer
from typer.testing import CliRunner

from paged_infer.bench import roofline
from paged_infer.bench.kernels import attention_traffic
from paged_infer.bench.kernels import checks as kernel_checks
from paged_infer.bench.kernels import cli as kernels_cli
from paged_infer.bench.kernels import comparisons as kernels
from paged_infer.bench.kernels import peers as kernel_peers
from paged_infer.bench.kernels.checks import CheckResult
from paged_infer.bench.kernels.fused import FUSED, Shape
from paged_infer.bench.kernels.peers import DECODE, PREFILL, Ready, Unavailable
from paged_infer.bench.kernels.problems import attention_float64, paged_attention_float64, paged_problem
from paged_infer.bench.kernels.report import OURS, Entry, KernelReport, LaunchCount, Measurement
from paged_infer.bench.roofline import Roofline
from paged_infer.bench.timing import Timing, time_calls
from paged_infer.cli import app
from paged_infer.kernels.attention.paged_attention import paged_attention_reference
from paged_infer.kernels.triton_runtime import HAS_TRITON, INTERPRETED, launches_go_to

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs triton, interpreting")
CPU = torch.device("cpu")
SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


@pytest.fixture
def by_the_clock(monkeypatch):
    """Comparisons on the CPU: once each, by the clock."""
    monkeypatch.setattr(kernels, "time_cuda_graph", lambda fn, **_: time_calls(fn, repeats=1, warm_up=0))


# -- Problems and checks


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_a_problem_holds_nan_wherever_no_token_lies(block_size):
    problem = paged_problem([(0, 9), (20, 1)], block_size=block_size, dtype=torch.float32, **SMALL)
    assert problem.sequences == ((20, 1), (0, 9))  # decodes first
    assert problem.hints == {"num_decodes": 1, "max_query_len": 9, "max_seq_len": 21}
    filled = ~problem.k_cache[..., 0, 0].isnan()
    assert int(filled.sum()) == 21 + 9
    names = ("q", "k_cache", "v_cache", "block_tables", "seq_lens", "query_start_loc")
    out = paged_attention_reference(**{name: getattr(problem, name) for name in names}, window=5)
    torch.testing.assert_close(out.double(), paged_attention_float64(problem, window=5), atol=1e-5, rtol=1e-5)


def test_float64_attention_is_the_definition():
    """One query that sees one key is its value; two equal keys share their values evenly."""
    q, k, v = torch.randn(2, 2, 8), torch.zeros(2, 1, 8), torch.randn(2, 1, 8)
    out = attention_float64(q, k, v)
    torch.testing.assert_close(out[0], v[0].double().expand(2, 8))
    torch.testing.assert_close(out[1], v.double().mean(0).expand(2, 8))
    torch.testing.assert_close(attention_float64(q, k, v, window=1)[1], v[1].double().expand(2, 8))


def test_nan_and_too_large_an_error_do_not_pass():
    assert CheckResult("k", "c", 1e-6, 1e-5).passed
    assert not CheckResult("k", "c", 1e-4, 1e-5).passed
    assert not CheckResult("k", "c", math.nan, 1e-5).passed


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """The command on this CPU, run once; the traffic is counted on a few tokens."""
    small = attention_traffic.count_traffic(
        head_dim=8, lengths=(16, 32), fast_sizes=(128,), fixed_length=32, fast_sweep=(128, 512)
    )
    folder = tmp_path_factory.mktemp("figures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_traffic, "count_traffic", lambda: small)
        arguments = ["bench", "kernels", "--device", "cpu", "--figures", str(folder)]
        return CliRunner().invoke(app, arguments), folder


@needs_interpreter
def test_on_a_cpu_the_command_checks_and_counts_and_times_nothing(on_cpu):
    result, folder = on_cpu
    assert result.exit_code == 0, result.output
    assert "on cpu" in result.output and "interpreted: small shapes, not timed" in result.output
    assert sorted(path.name for path in folder.iterdir()) == [
        "attention_traffic.json", "attention_traffic.png", "bench-kernels-cpu.json",
    ]  # fmt: skip
    report = KernelReport.read(folder / "bench-kernels-cpu.json")
    assert (report.device, report.roofline, report.measurements) == ("cpu", None, [])
    assert all(check.passed for check in report.checks)
    assert {check.kernel for check in report.checks} == {*OURS, "latent_decode", "store_kv_8_bits"}
    # One launch a layer, where torch needs two operations, or five to leave out padding: counted, for 32 layers.
    assert report.launches == [
        LaunchCount("store_kv", None, 32),
        LaunchCount("torch, two index_copy_", 64, None),
        LaunchCount("torch, leaving out slot -1", 160, None),
    ]
    assert all(reach.measured is None for reach in report.reaches())


@needs_interpreter
def test_a_wrong_kernel_is_named_and_costs_the_others_nothing(tmp_path, monkeypatch):
    right = FUSED["silu_mul"]
    wrong = replace(right, function=lambda gate_up: right.function(gate_up) * 1.01)
    monkeypatch.setitem(FUSED, "silu_mul", wrong)
    checks = {name: kernel_checks.CHECKS[name] for name in ("store_kv", "copy_blocks", "add_rms_norm", "silu_mul")}
    monkeypatch.setattr(kernel_checks, "CHECKS", checks)
    result = CliRunner().invoke(app, ["bench", "kernels", "--device", "cpu", "--figures", str(tmp_path)])
    assert result.exit_code == 1
    assert "error: differs from float64: silu_mul (float32: 0.00" in result.output
    assert "storing one decode step" in result.output
    checks = KernelReport.read(tmp_path / "bench-kernels-cpu.json").checks
    assert {check.kernel for check in checks if not check.passed} == {"silu_mul"}


@needs_interpreter
def test_a_quantised_product_is_compared_with_a_dense_one_of_the_same_values(monkeypatch):
    monkeypatch.setitem(kernels.MATRICES, "gate and up", (70, 256))
    comparisons = [one for one in kernels.linear_comparisons(torch.device("cpu")) if one.sizes == {"tokens": 1}]
    assert [one.title.split(",")[0] for one in comparisons] == list(kernels.LINEAR_GRIDS)
    for comparison in comparisons:
        problem = comparison.problem()
        ours, dense = (peer(problem).call() for peer in comparison.peers.values())
        assert kernels._distance(dense, ours) <= kernels.LARGEST_DISTANCE


def test_a_wrong_kernel_has_no_time_and_its_peers_are_compared_with_each_other(monkeypatch):
    monkeypatch.setattr(kernels, "time_cuda_graph", lambda call, **_: Timing((1.0,), "cuda graph"))
    out = torch.ones(2, 3, 8)
    found = {"flash_attention": out * 2, "SDPA flash": out}
    peers = {name: partial(lambda values, problem: Ready(lambda: values), values) for name, values in found.items()}
    sizes = {"head_dim": 8, "length": 2}
    whole = kernels.Comparison("prefill", "2 tokens", sizes, 1.0, 0, lambda: None, peers)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 1))
    *_, measurement = whole.without({"flash_attention"}).run()
    assert measurement.seconds("SDPA flash") == 1.0
    assert [e.note for e in measurement.entries if e.seconds is None] == ["differs from float64: see the checks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "abacus"), "device='abacus': must be auto, cpu or cuda"),
        (("--quick",), "--quick and --arch go with --compile-only"),
        (("--compile-only", "--arch", "90", "--arch", "75"), "arch=75: known chips are 80, "),
        pytest.param(
            ("--device", "cuda"),
            "device='cuda': there is no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there"),
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(arguments, message):
    result = CliRunner().invoke(app, ["bench", "kernels", *arguments])
    assert result.exit_code == 2
    assert result.output.startswith(f"error: {message}") and result.output.count("\n") == 1


# -- Comparisons


def test_whoever_cannot_run_or_gives_other_numbers_is_named_with_the_reason(by_the_clock):
    right = torch.randn(6, 4, 8)

    def missing() -> Ready:
        raise Unavailable("not importable: No module named 'peer'")

    def falls_over() -> torch.Tensor:
        raise RuntimeError("no kernel\nfor this chip")

    entries = kernels.run_comparison(
        {
            "flash_attention": lambda: Ready(lambda: right),
            "same": lambda: Ready(lambda: right.view(2, 3, 4, 8).transpose(1, 2), "laid out beforehand"),
            "missing": missing,
            "falls over": lambda: Ready(falls_over),
            "wrong": lambda: Ready(lambda: right * 1.1),
            "NaN": lambda: Ready(lambda: right * math.nan),
            "misshapen": lambda: Ready(lambda: right[:3]),
        }
    )
    timed = {entry.name for entry in entries if entry.seconds is not None}
    assert timed == {"flash_attention", "same"}
    notes = {entry.name: entry.note for entry in entries}
    assert list(notes) == ["flash_attention", "same", "missing", "falls over", "wrong", "NaN", "misshapen"]
    assert notes["same"] == "clock, laid out beforehand"
    assert notes["missing"] == "not importable: No module named 'peer'"
    assert notes["falls over"] == "RuntimeError: no kernel"
    assert notes["wrong"] == "gives other numbers than flash_attention: 0.1 apart"
    assert notes["NaN"].startswith("gives other numbers")
    assert notes["misshapen"] == "gives [3, 4, 8], not [6, 4, 8]"


def test_kernels_take_turns_and_the_median_is_reported(monkeypatch):
    turns, seconds = [], {"a": iter([1.0, 5.0, 2.0]), "b": iter([7.0, 7.0, 7.0])}

    def timed(fn, **_):
        turns.append(fn())
        return Timing((next(seconds[turns[-1]]),), "cuda graph")

    monkeypatch.setattr(kernels, "time_cuda_graph", timed)
    monkeypatch.setattr(kernels, "packed", lambda out: torch.ones(1))
    entries = kernels.run_comparison({name: partial(Ready, lambda name=name: name) for name in "ab"})
    assert turns == ["a", "b"] * 3
    assert [entry.seconds for entry in entries] == [2.0, 7.0]


@needs_interpreter
@pytest.mark.parametrize(
    ("sequences", "peers"), [([(0, 20)] * 2, PREFILL), ([(30, 1)] * 3, DECODE)], ids=["prefill", "decode"]
)
def test_every_peer_here_agrees_or_says_why_it_does_not_run(sequences, peers, by_the_clock, monkeypatch):
    monkeypatch.setattr(kernel_peers, "FLEX_SIZES", ())  # compiling it takes long
    problem = paged_problem(sequences, dtype=torch.float16, poison=False, **SMALL)
    entries = kernels.run_comparison({name: partial(peer, problem) for name, peer in peers.items()})
    assert [entry.name for entry in entries] == list(peers)
    ran = {entry.name for entry in entries if entry.seconds is not None}
    assert {"flash_attention", "paged_attention", "gather + SDPA"} & set(peers) <= ran
    for entry in entries:
        assert entry.note
        assert "gives" not in entry.note, f"{entry.name} {entry.note}"


def test_dense_and_packed_layouts_hold_the_same_attention():
    problem = paged_problem([(0, 7)] * 3, block_size=3, **SMALL)
    q, k, v = problem.dense
    rows = [attention_float64(*(x[row].transpose(0, 1) for x in (q, k, v))) for row in range(3)]
    assert torch.equal(torch.cat(rows), paged_attention_float64(problem))
    assert torch.equal(problem.packed[0], k.transpose(1, 2).flatten(0, 1))
    with pytest.raises(ValueError, match="no dense layout"):
        _ = paged_problem([(0, 7), (0, 8)], **SMALL).dense


def test_flashinfers_tables_say_what_the_block_tables_say():
    problem = paged_problem([(32, 1), (0, 16), (4, 2)], **SMALL)
    starts, blocks, last = kernel_peers._pages(problem)
    assert starts.tolist() == [0, 3, 4, 5]
    assert last.tolist() == [1, 16, 6]
    assert blocks.tolist() == [int(problem.block_tables[at]) for at in ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0))]


def test_operations_and_bytes_are_counted_as_the_header_says():
    comparisons = {comparison.title: comparison for comparison in kernels.attention_comparisons(CPU)}
    prefill = comparisons["prefill, head_dim 128, 4 x 4,096 tokens"]
    assert prefill.work == 4 * 32 * 128 * 4 * (4096 * 4096 / 2)
    decode = comparisons["decode, batch 32, context 4,096"]
    problem = paged_problem([(4095, 1)], num_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, poison=False)
    assert decode.work == 32 * sum(x.nbytes for x in problem.packed)
    sizes = {tuple(comparison.sizes.values()) for comparison in comparisons.values() if comparison.group == "decode"}
    assert sizes == {(b, n * 1024) for b in (1, 8, 32, 128) for n in (1, 2, 4, 8, 16, 32)}


def test_races_that_the_time_or_the_memory_does_not_allow_are_left_out_and_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**31))
    comparisons = kernels.attention_comparisons(CPU)
    large = next(comparison for comparison in comparisons if comparison.sizes == {"batch": 128, "context": 32_768})
    late = list(kernels.run_comparisons(comparisons[:1], deadline_s=0.0, limit="the time limit of 5 s"))
    skipped = [*large.run(), *late]
    notes = [{entry.note for entry in measurement.entries} for measurement in skipped]
    assert notes == [{"needs 16.0 GiB, the device has 1.0 free"}, {"left out: the time limit of 5 s had passed"}]
    assert [len(measurement.entries) for measurement in skipped] == [len(DECODE), len(DECODE)]
    report = KernelReport("cuda", {}, measurements=skipped)
    assert report.failures() == []
    assert len(report.absences()) == 2 * len(DECODE)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_the_plan_of_a_decode_is_made_once_as_flashinfers_is():
    problem = paged_problem([(4095, 1)] * 2, num_heads=8, num_kv_heads=2, head_dim=64, device="meta", poison=False)
    launched = []
    with launches_go_to(lambda kernel, *_: launched.append(kernel.fn.__name__), (9, 0)):
        ready = kernel_peers.our_paged(problem)
        ready.call()
        ready.call()
    assert launched == ["_plan_kernel", *["_decode_kernel", "_combine_kernel"] * 2]


def test_comparisons_come_in_order_of_worth():
    titles = [comparison.title for comparison in kernels.attention_comparisons(CPU)]
    assert titles[:5] == [
        "decode, batch 32, context 4,096", "decode, batch 1, context 32,768", "prefill, head_dim 128, 4 x 4,096 tokens",
        "prefill, head_dim 128, 2 x 8,192 tokens", "prefill, head_dim 128, 1 x 16,384 tokens",
    ]  # fmt: skip
    assert all("head_dim 64" in title for title in titles[-len(kernels.LENGTHS) :])
    assert len(set(titles)) == len(titles) == len(kernels.BATCHES) * len(kernels.CONTEXTS) + 2 * len(kernels.LENGTHS)


def test_flex_attention_is_compiled_for_one_shape_only():
    assert kernel_peers.FLEX_SIZES == ((4096, 128),)
    with pytest.raises(Unavailable, match="timed at 4,096 tokens of head_dim 128 only"):
        kernel_peers.flex(paged_problem([(0, 8)], **SMALL))


def test_each_timing_is_known_before_the_next_begins(by_the_clock):
    called = []
    setups = {name: lambda name=name: Ready(lambda: called.append(name) or torch.ones(1)) for name in "ab"}
    steps = [
        ("".join(called), [entry.name for entry in entries if entry.seconds is not None])
        for entries in kernels.compare(setups)
    ]
    assert steps[:3] == [("ab", []), ("aba", ["a"]), ("abab", ["a", "b"])]


def test_past_the_deadline_no_timing_begins_and_what_was_timed_stays(monkeypatch, by_the_clock):
    now = iter([0.0, 0.0, 0.0, 5.0, 5.0, 5.0, 5.0, 5.0])  # two are set up; the first is timed once
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: next(now))
    setups = {name: lambda: Ready(lambda: torch.ones(1)) for name in ("flash_attention", "paged_attention")}
    monkeypatch.setattr(kernels, "time_cuda_graph", lambda fn, **_: Timing((7.0,), "cuda graph"))
    *_, entries = kernels.compare(setups, 1.0, "the time limit of 1 s")
    left_out = Entry("paged_attention", None, "left out: the time limit of 1 s had passed")
    assert entries == [Entry("flash_attention", 7.0, "cuda graph"), left_out]
    measurement = Measurement("prefill", "a title", {}, 1.0, entries)
    assert KernelReport("cuda", {}, measurements=[measurement]).failures() == []


def test_a_comparison_that_goes_on_takes_the_place_of_its_earlier_self():
    report = KernelReport("cuda", {})
    first, second, other = (Measurement("fused", title, {}, work, []) for title, work in (("a", 1), ("a", 2), ("b", 3)))
    assert [report.record(measurement) for measurement in (first, second, other)] == [True, False, True]
    assert report.measurements == [second, other]


@needs_interpreter
def test_what_a_gpu_would_do_from_end_to_end_with_made_up_times(tmp_path, monkeypatch, capsys):
    """The whole bench on small sizes, interpreted: every comparison is run and shown, and what is broken is said."""
    for module, sizes in (
        (kernels, {"PREFILL_TOKENS": 32, "LENGTHS": (16, 32), "BATCHES": (2,), "CONTEXTS": (32,), "ROUNDS": 1}),
        (kernels, {"MODEL": Shape(**SMALL, hidden=32, intermediate=48, vocab=500), "FUSED_TOKENS": (3, 5)}),
        (kernels, {"MATRICES": {"gate and up": (70, 256)}, "LINEAR_TOKENS": (3,), "CODED_DECODES": ((2, 32),)}),
        (kernel_peers, {"FLEX_SIZES": ()}),
    ):
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
    made_up = iter(range(1, 1000))
    monkeypatch.setattr(kernels, "time_cuda_graph", lambda fn, **_: Timing((next(made_up) * 1e-6,), "cuda graph"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**34, 2**34))
    monkeypatch.setattr(roofline, "measure", lambda device: Roofline(4e12, 3e12, 8e14, "bfloat16", "made up"))
    monkeypatch.setitem(kernel_peers.DECODE, "flashinfer", lambda problem: Ready(lambda: problem.q * 0))

    report = KernelReport("cuda", {"device": "a made-up GPU"})
    path = tmp_path / "bench-kernels.json"
    kernels_cli._run_comparisons(report, CPU, math.inf, "no limit", path)
    assert KernelReport.read(path) == report
    assert {m.group for m in report.measurements} == {"prefill", "decode", "decode_8_bits", "linear", "fused"}
    assert len(report.measurements) == 2 * 2 + 1 + 2 + len(kernels.LINEAR_GRIDS) + 2 * 4 + 1
    for measurement in report.measurements:
        for entry in measurement.entries:
            assert entry.seconds is not None or entry.note, measurement.title
            assert entry.seconds is not None or entry.name not in (*OURS, "torch"), (entry.name, entry.note)
    absent = dict(report.absences())
    assert absent["flashinfer"].startswith(("not importable", "gives other numbers than paged_attention: 1 "))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bench-kernels-decode.png", "bench-kernels-prefill.png", "bench-kernels.json",
    ]  # fmt: skip
    said = capsys.readouterr().out
    for words in (
        "prefill, head_dim 64",
        "decode, batch 2",
        "sample, 3 tokens",
        "decode over int8, batch 2",
        "targets",
    ):
        assert words in said

    def silu_mul(gate_up: torch.Tensor) -> float:
        return 1 / 0

    monkeypatch.setitem(FUSED, "silu_mul", replace(FUSED["silu_mul"], function=silu_mul))
    monkeypatch.setattr(kernels, "FUSED_TOKENS", (3,))
    monkeypatch.setattr(kernels, "attention_comparisons", lambda device: [])
    report = KernelReport("cuda", {"device": "-"})
    kernels_cli._run_comparisons(report, CPU, math.inf, "no limit", path)
    with pytest.raises(typer.Exit) as exit_:
        kernels_cli._exit_if_wrong(report)
    assert exit_.value.exit_code == 1
    assert "error: did not run: silu_mul, 3 tokens: silu_mul: ZeroDivisionError" in capsys.readouterr().err
