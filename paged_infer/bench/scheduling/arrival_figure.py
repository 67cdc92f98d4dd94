"""The arrival picture: what those who decode notice of a long prompt."""

from __future__ import annotations

from matplotlib.axes import Axes

from paged_infer.bench.scheduling.arrival import ArrivalReport, ArrivalRun
from paged_infer.viz.style import BASELINE_COLOURS, FAINT, INK, Picture, log_heights, new_picture

CHUNKED_COLOURS = (BASELINE_COLOURS["paged"], "#7db3d8", "#173f5f")


def arrival_figure(report: ArrivalReport) -> Picture:
    """The gap that ends at each token of the running requests, over time; a mark where the long prompt is through."""
    figure = new_picture(7.6, 3.4)
    axes = figure.subplots()
    chunked = iter(CHUNKED_COLOURS * len(report.runs))
    for run in report.runs:
        whole = run.max_num_batched_tokens >= report.num_prompt_tokens
        _draw(axes, run, BASELINE_COLOURS["static"] if whole else next(chunked))
    log_heights(axes)
    axes.set_xlabel("seconds since the prompt arrived (a dot: its first token)", fontsize=8.5, color=INK)
    axes.set_title("longest wait of a running request for its next token, ms", fontsize=9, color=INK, loc="left")
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    title = f"{report.num_prompt_tokens:,} tokens arrive while {report.num_running} requests decode"
    figure.suptitle(f"{title} ({report.served_by})", fontsize=9.5, color=INK)
    return figure


def _draw(axes: Axes, run: ArrivalRun, colour: str) -> None:
    label = f"{run.name}\nat most {1e3 * run.longest_gap_s:,.0f} ms, first token {run.ttft_s:,.2f} s"
    ends = [moment for moment, _ in run.moments]
    gaps_ms = [1e3 * gap for _, gap in run.moments]
    # A gap is drawn from the token before it to the token that ends it; before the first of them it is as usual.
    usual_ms, began_s = 1e3 * run.usual_gap_s, ends[0] - run.moments[0][1]
    places = [began_s - 0.06 * ends[-1], began_s, *ends]
    axes.step(places, [usual_ms, usual_ms, *gaps_ms], where="pre", color=colour, linewidth=1.6, label=label)
    at = next(place for place, moment in enumerate(ends) if moment >= run.ttft_s)
    axes.plot([run.ttft_s], [gaps_ms[at]], "o", color=colour, markersize=6)
