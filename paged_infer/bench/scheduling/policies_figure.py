"""The pictures of policies and of an arrival: how long requests wait for their first token, and for each later one."""

from __future__ import annotations

import math
from collections import Counter

from matplotlib.axes import Axes

from paged_infer.bench.scheduling.arrival import ArrivalReport, ArrivalRun
from paged_infer.bench.scheduling.policies import GAP_QUANTILES, PoliciesReport, PolicyReport
from paged_infer.viz.style import BASELINE_COLOURS, INK, Picture, log_heights, new_picture, tidy_axes

POLICY_COLOURS = {
    "static": BASELINE_COLOURS["static"],
    "dynamic": BASELINE_COLOURS["cached"],
    "prefill_first": BASELINE_COLOURS["transformers"],
    "chunked": BASELINE_COLOURS["paged"],
}
CHUNKED_COLOURS = (BASELINE_COLOURS["paged"], "#7db3d8", "#173f5f")
LAST = 3e-4  # where the longest gap of all is drawn
DELAYED = ("-", "--", ":", "-.")  # the same policy with another delay


def policies_figure(report: PoliciesReport) -> Picture:
    """Longest waits (left), the gaps between tokens by rank (middle), and the wait for the first token (right)."""
    figure = new_picture(9.0, 3.5)
    stalls, gaps, firsts = figure.subplots(1, 3, width_ratios=(1.2, 1.0, 1.0))
    styles = _styles(report.policies)
    _stall_panel(stalls, report.policies, styles)
    for policy in report.policies:
        colour, line = styles[policy.name]
        shares = [_nines(share) for share in GAP_QUANTILES]
        gaps.plot(shares, [1e3 * s for s in policy.gap_quantiles_s], line, color=colour, linewidth=1.7)
        ranks = [(index + 1) / len(policy.ttft_s) for index in range(len(policy.ttft_s))]
        firsts.plot(policy.ttft_s, ranks, line, color=colour, linewidth=1.7, label=policy.name)
    log_heights(gaps)
    marks = (0.5, 0.9, 0.99, 0.999)
    gaps.set_xticks([_nines(mark) for mark in (*marks, 1.0)], [*(f"{100 * mark:g} %" for mark in marks), "all"])
    gaps.set_xlim(_nines(0.5), _nines(1.0) + 0.1)
    firsts.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    firsts.set_ylim(0, 1.02)
    firsts.set_xlim(left=0)
    tidy_axes(stalls, grid=None, title="longest wait (hatched: for the 2nd token)", labelsize=8)
    tidy_axes(gaps, title="gap between tokens, ms, by rank", labelsize=8)
    tidy_axes(firsts, title="first token within so many seconds", labelsize=8)
    _legend(figure, firsts)
    figure.suptitle(f"{report.served_by}: {report.load}", fontsize=9, color=INK)
    return figure


def _legend(figure: Picture, axes: Axes) -> None:
    """A line below the panels that names the lines of ``axes``."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)


def _nines(share: float) -> float:
    """A place for a share on an axis where each nine more is one step."""
    return -math.log10(max(1 - share, LAST))


def _styles(policies: list[PolicyReport]) -> dict[str, tuple[str, str]]:
    styles: dict[str, tuple[str, str]] = {}
    seen = Counter[str]()
    for policy in policies:
        kind = policy.name.split(",")[0]
        styles[policy.name] = POLICY_COLOURS.get(kind, INK), DELAYED[seen[kind] % len(DELAYED)]
        seen[kind] += 1
    return styles


def _stall_panel(axes: Axes, policies: list[PolicyReport], styles: dict[str, tuple[str, str]]) -> None:
    names = [policy.name.replace(", ", ",\n") for policy in policies]
    places = range(len(policies))
    colours = [styles[policy.name][0] for policy in policies]
    stalls_ms = [1e3 * policy.longest_stall_s for policy in policies]
    starts_ms = [1e3 * policy.longest_start_s for policy in policies]
    stalls = axes.barh([place - 0.2 for place in places], stalls_ms, 0.36, color=colours)
    starts = axes.barh(
        [place + 0.2 for place in places], starts_ms, 0.36, color="white", edgecolor=colours, hatch="////"
    )
    for bars, waits_ms in ((stalls, stalls_ms), (starts, starts_ms)):
        axes.bar_label(bars, [f"{wait:,.0f} ms" for wait in waits_ms], padding=3, fontsize=8, color=INK)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * max(*stalls_ms, *starts_ms))
    axes.set_xticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def arrival_figure(report: ArrivalReport) -> Picture:
    """The gap that ends at each token of the running requests, over time; a mark where the long prompt is through."""
    figure = new_picture(7.6, 3.4)
    axes = figure.subplots()
    chunked = iter(CHUNKED_COLOURS * len(report.runs))
    for run in report.runs:
        whole = run.max_num_batched_tokens >= report.num_prompt_tokens
        _draw_arrival(axes, run, BASELINE_COLOURS["static"] if whole else next(chunked))
    log_heights(axes)
    axes.set_xlabel("seconds since the prompt arrived (a dot: its first token)", fontsize=8.5, color=INK)
    tidy_axes(axes, title="longest wait of a running request for its next token, ms", labelsize=8.5)
    _legend(figure, axes)
    title = f"{report.num_prompt_tokens:,} tokens arrive while {report.num_running} requests decode"
    figure.suptitle(f"{title} ({report.served_by})", fontsize=9.5, color=INK)
    return figure


def _draw_arrival(axes: Axes, run: ArrivalRun, colour: str) -> None:
    label = f"{run.name}\nat most {1e3 * run.longest_gap_s:,.0f} ms, first token {run.ttft_s:,.2f} s"
    ends = [moment for moment, _ in run.moments]
    gaps_ms = [1e3 * gap for _, gap in run.moments]
    # A gap is drawn from the token before it to the token that ends it; before the first of them it is as usual.
    usual_ms, began_s = 1e3 * run.usual_gap_s, ends[0] - run.moments[0][1]
    places = [began_s - 0.06 * ends[-1], began_s, *ends]
    axes.step(places, [usual_ms, usual_ms, *gaps_ms], where="pre", color=colour, linewidth=1.6, label=label)
    at = next(place for place, moment in enumerate(ends) if moment >= run.ttft_s)
    axes.plot([run.ttft_s], [gaps_ms[at]], "o", color=colour, markersize=6)
