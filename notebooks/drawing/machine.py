"""A machine's limits: its roofline, the least times that follow from it, and what its memory holds."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as ReadOnlyList

from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator

from paged_infer.bench.roofline import Roofline
from paged_infer.bench.scheduling.memory_figure import PART_COLOURS, PART_NAMES
from paged_infer.viz.style import INK, Picture, new_picture

from .charts import BLUE, ORANGE, RED


def roofline_picture(roof: Roofline, steps: Mapping[str, ReadOnlyList[tuple[float, float]]]) -> Picture:
    """Steps below the roof: of each (operations a byte, GFLOP/s), on logarithmic axes."""
    picture = new_picture(7, 3.4)
    axes = picture.subplots()
    dots = [dot for found in steps.values() for dot in found]
    ends = [0.8 * min(x for x, _ in dots), 2 * max(*(x for x, _ in dots), roof.ridge_flops_per_byte)]
    corners = [ends[0], roof.ridge_flops_per_byte, ends[1]]
    heights = [min(roof.matmul_flops_per_s, x * roof.bandwidth_bytes_per_s) / 1e9 for x in corners]
    axes.plot(corners, heights, color=INK, label="roof: bandwidth, then peak")
    for (name, found), colour in zip(steps.items(), (ORANGE, BLUE, RED), strict=True):
        axes.plot(*zip(*found, strict=True), "o-", color=colour, label=name, linewidth=1, markersize=4)
    labels = {"xlabel": "arithmetic intensity, operations a byte", "ylabel": "GFLOP/s"}
    axes.set(xscale="log", yscale="log", title="the roofline of this machine, and steps of a decoder", **labels)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower right")
    return picture


def floors_picture(
    roof: Roofline, parameters: float, weight_bytes: float, kv_token_bytes: float, context: int, batch: int
) -> Picture:
    """The least that reading and computing take, for a prefill of one prompt and a decode step of a batch."""
    per_s, flops_per_s = roof.bandwidth_bytes_per_s, roof.matmul_flops_per_s
    read_s, cache_s = weight_bytes / per_s, batch * context * kv_token_bytes / per_s
    prefill_s, decode_s = (2 * parameters * tokens / flops_per_s for tokens in (context, batch))
    picture = new_picture(7, 2.8)
    axes = picture.subplots()
    axes.barh([0, 2], [1e3 * read_s] * 2, color=BLUE, label="read weights")
    axes.barh([2], [1e3 * cache_s], left=1e3 * read_s, color=RED, label="read caches")
    axes.barh([1, 3], [1e3 * prefill_s, 1e3 * decode_s], color=ORANGE, label="compute")
    axes.set_yticks([0.5, 2.5], [f"prefill,\n{context:,} tokens", f"decode,\n{batch} texts"])
    axes.invert_yaxis()
    ttft_s, tpot_s = max(read_s, prefill_s), max(read_s + cache_s, decode_s)
    gb = (weight_bytes + batch * context * kv_token_bytes) / 1e9
    speed = f"TTFT {1e3 * ttft_s:.0f} ms, TPOT {1e3 * tpot_s:.1f} ms, {batch / tpot_s:,.0f} tokens/s"
    axes.set(title=f"{speed}, {gb:.0f} GB", xlabel="milliseconds at least")
    picture.legend(frameon=False, loc="outside lower center", ncols=3)
    return picture


def memory_shares(rows: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]], title: str) -> Picture:
    """Per cent of a memory, each row measured (above) and as the paper has it (below, paler): ``PART_NAMES``."""
    picture = new_picture(7, 3.2)
    axes = picture.subplots()
    for number, both in enumerate(rows.values()):
        for shares, place, height, alpha, note in zip(
            both, (number, number + 0.34), (0.42, 0.2), (1, 0.55), ("", " in the paper"), strict=True
        ):
            left = 0.0
            for part, colour in PART_COLOURS.items():
                axes.barh(place, 100 * shares[part], height, left, color=colour, alpha=alpha)
                left += 100 * shares[part]
            axes.text(102, place, f"{shares['tokens']:.1%}{note}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlim=(0, 130), ylim=(len(rows) - 0.3, -0.5), xticks=range(0, 101, 20), xlabel="% of all slots")
    patches = [Patch(color=PART_COLOURS[part], label=name) for part, name in PART_NAMES.items()]
    axes.set_title(title)
    picture.legend(handles=patches, frameon=False, loc="outside lower center", ncols=4, fontsize=8)
    return picture
