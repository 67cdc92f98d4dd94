"""``paged-infer compare``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from paged_infer.bench.speed import cli as speed_cli
from paged_infer.cli_options import RESULTS, BeginningsSeed, Engine, Figures, Model, open_llm, with_option_groups
from paged_infer.terminal import fail

if TYPE_CHECKING:
    from paged_infer.bench.metrics import System
    from paged_infer.bench.workloads import Workload

PROBE_TOKENS = 4


@with_option_groups
def compare(
    engine: Engine,
    model: Model = None,
    num_prompts: Annotated[int, typer.Option(help="Number of requests, all submitted at the start.", min=1)] = 16,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate for each of them.", min=1)] = 128,
    seed: BeginningsSeed = 0,
    figures: Figures = RESULTS,
) -> None:
    """Run the same prompts through the ladder's four baselines and transformers: same tokens, at what cost?

    Takes half a minute with the storyteller on two CPU cores. Prints first how long it may take here. Exits with
    status 1 if any of them generates different tokens.
    """
    try:
        llm = open_llm(model, **engine.options)
        from paged_infer.bench.peers.transformers_peers import transformers_baselines
        from paged_infer.bench.speed.baselines import our_baselines
        from paged_infer.bench.speed.ladder import run_ladder
        from paged_infer.bench.workloads import story_beginnings

        workload = story_beginnings(llm, num_prompts, max_tokens, seed)
        systems = {**our_baselines(llm), **transformers_baselines(llm)}
        seconds = most_seconds(systems["naive"], workload)
        what = f"{len(systems)} systems on {num_prompts} prompts, one system after another"
        typer.echo(f"{what}: may take {seconds:,.0f} s", err=True)
        with speed_cli.progress(len(systems)) as advance:
            save = speed_cli.save_to(figures, "ladder")
            report = run_ladder(llm, systems, workload, on_run=advance, save=save)
    except ValueError as error:
        fail(error)
    speed_cli.show(report, figures, "ladder")
    if not all(entry.is_right for entry in report.entries):
        raise typer.Exit(1)


def most_seconds(naive: System, workload: Workload) -> float:
    """Seconds that the comparison may take if no text ends early: twice the naive baseline's, which is about half.

    The baseline computes the whole text for each token, so a few tokens after the longest prompt give its rate.
    """
    from paged_infer.bench.workloads import Workload

    index = max(range(len(workload.prompts)), key=lambda one: len(workload.prompts[one]))
    few = replace(workload.params[index], max_tokens=PROBE_TOKENS, ignore_eos=True)
    alone = Workload("probe", [workload.prompts[index]], [few], workload.seed)
    seconds = min(naive(alone).seconds for _ in range(3)) / PROBE_TOKENS
    return 2 * seconds * sum(one.max_tokens or 0 for one in workload.params)
