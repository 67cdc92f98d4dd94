"""Ratios, shares and failures follow from what was timed, and a report survives its JSON."""

from __future__ import annotations

import json

import pytest

from paged_infer.bench.kernels.checks import CheckResult
from paged_infer.bench.kernels.report import Entry, KernelReport, Measurement
from paged_infer.bench.roofline import Roofline


def report_of(*measurements: Measurement) -> KernelReport:
    roofline = Roofline(4e12, 3e12, 8e14, "bfloat16", "a GPU")
    check = CheckResult("flash_attention", "float32, causal", 1e-7, 1e-5)
    return KernelReport("cuda", {"device": "a GPU"}, [check], roofline, measurements=list(measurements))


def test_ratios_shares_and_reaches_follow_from_the_seconds(tmp_path):
    sizes = {"head_dim": 128, "batch": 1}
    ours, paged, flash = ("flash_attention", "paged_attention", "SDPA flash")
    report = report_of(
        Measurement("prefill", "4k", sizes | {"length": 4096}, 8e12, [Entry(ours, 0.02), Entry(flash, 0.03)]),
        Measurement("prefill", "8k", sizes | {"length": 8192}, 8e12, [Entry(ours, 0.02), Entry(flash, 0.026)]),
        Measurement("prefill", "1k", sizes | {"length": 1024}, 8e12, [Entry(ours, 0.02), Entry(flash, 0.001)]),
        Measurement("decode", "usual", {"batch": 32, "context": 4096}, 4e9, [Entry(paged, 0.00125)]),
    )
    first, *_, decode = report.measurements
    assert first.rate(ours) == pytest.approx(4e14) and first.ratio(ours, flash) == pytest.approx(1.5)
    assert first.rate("SDPA cuDNN") is None and first.ratio(ours, "SDPA cuDNN") is None
    assert report.share_of_copy(decode, paged) == pytest.approx(0.8)
    measured = [reach.measured for reach in report.reaches()]
    assert measured == [pytest.approx(1.3), None, None, pytest.approx(0.8), None, None]
    report.save(tmp_path / "deep" / "report.json")
    assert KernelReport.read(tmp_path / "deep" / "report.json") == report
    stored = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert stored["reaches"][0]["measured"] == pytest.approx(1.3)


def test_our_own_kernel_failing_on_a_gpu_is_a_failure_and_a_missing_peer_is_not():
    missing = Entry("flashinfer", None, "not importable")
    fine = Measurement("decode", "a", {}, 1.0, [Entry("paged_attention", 1.0), missing])
    assert report_of(fine).failures() == []
    broken = Measurement("decode", "b", {}, 1.0, [Entry("paged_attention", None, "OutOfResources"), missing])
    assert report_of(fine, broken).failures() == ["b: paged_attention: OutOfResources"]
    assert report_of(fine, broken).absences() == [
        ("flashinfer", "not importable (2 comparisons)"),
        ("paged_attention", "OutOfResources (b)"),
    ]
