"""The kernels' pictures show the report's numbers, also where peers are missing, and nothing that was not measured."""

from __future__ import annotations

import pytest

from paged_infer.bench.kernels.figure import decode_figure, prefill_figure
from paged_infer.bench.kernels.report import Entry, KernelReport, Measurement
from paged_infer.bench.roofline import Roofline

LENGTHS, CONTEXTS, BATCHES = (1024, 2048, 4096, 8192, 16_384), (1024, 4096, 32_768), (1, 8, 32, 128)


def made_up_report() -> KernelReport:
    """Numbers that no GPU has given: for tests, and never for figures/."""
    speeds = {"flash_attention": 0.62, "paged_attention": 0.51, "SDPA flash": 0.45, "SDPA cuDNN": 0.78}
    shares = {"paged_attention": 0.92, "gather + SDPA": 0.21}
    measurements = []
    for head_dim in (128, 64):
        for length in LENGTHS:
            work = 4 * 32 * head_dim * 16_384 * length / 2
            rates = {name: speed * 8e14 * length / (length + 900) for name, speed in speeds.items()}
            if length in (4096, 16_384):
                rates["flex_attention"] = 4e14
            entries = [Entry(name, work / rate, "cuda graph") for name, rate in rates.items()]
            entries.append(Entry("flashinfer", None, "not importable: No module named 'flashinfer'"))
            sizes = {"head_dim": head_dim, "length": length, "batch": 16_384 // length}
            measurements.append(Measurement("prefill", f"{head_dim} {length}", sizes, work, entries))
    for batch in BATCHES:
        for context in CONTEXTS:
            work = 2.0 * batch * context * 8 * 128 * 2
            full = batch * context / (batch * context + 20_000)
            entries = [Entry(name, work / (share * full * 4e12), "cuda graph") for name, share in shares.items()]
            sizes = {"batch": batch, "context": context}
            measurements.append(Measurement("decode", f"{batch} {context}", sizes, work, entries))
    roofline = Roofline(4e12, 4.2e12, 7.7e14, "bfloat16", "made up")
    return KernelReport("cuda", {"device": "a made-up GPU"}, roofline=roofline, measurements=measurements)


@pytest.fixture
def report() -> KernelReport:
    return made_up_report()


def lines(axes):
    """{name: {x: y}} of everything with a name."""
    return {
        line.get_label(): dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def test_prefill_lines_are_the_measured_teraflops(report):
    wide, narrow = prefill_figure(report).axes
    assert (wide.get_title("left"), narrow.get_title("left")) == ("head_dim 128", "head_dim 64")
    for axes, head_dim in ((wide, 128), (narrow, 64)):
        drawn = lines(axes)
        for m in report.group("prefill", head_dim=head_dim):
            teraflops = m.work / m.seconds("flash_attention") / 1e12
            assert drawn["flash_attention"][m.sizes["length"]] == pytest.approx(teraflops)
        assert set(drawn["flex_attention"]) == {4096, 16_384}
        assert "flashinfer" not in drawn


def test_decode_lines_are_shares_of_the_measured_copy(report):
    panels = decode_figure(report).axes
    assert len(panels) == len(BATCHES)
    for axes, batch in zip(panels, BATCHES, strict=True):
        for m in report.group("decode", batch=batch):
            share = 100 * m.work / m.seconds("paged_attention") / 4e12
            assert lines(axes)["paged_attention"][m.sizes["context"]] == pytest.approx(share)


def test_a_race_that_nobody_ran_leaves_a_gap_and_a_report_without_any_is_refused(report):
    first, *others = report.group("decode", batch=1)
    skipped = Measurement("decode", first.title, first.sizes, first.work, [Entry("paged_attention", None, "left out")])
    gap = KernelReport("cuda", report.machine, roofline=report.roofline, measurements=[skipped, *others])
    assert 1024 not in lines(decode_figure(gap).axes[0])["paged_attention"]
    empty = KernelReport("cuda", report.machine, measurements=[skipped])
    with pytest.raises(ValueError, match="no decode that ran"):
        decode_figure(empty)
    with pytest.raises(ValueError, match="no prefill that ran"):
        prefill_figure(empty)


def test_pictures_are_small_pngs(report, tmp_path):
    for name, draw in (("prefill", prefill_figure), ("decode", decode_figure)):
        draw(report).save(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.png").stat().st_size < 250_000
