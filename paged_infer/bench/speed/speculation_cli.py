"""``paged-infer bench speculation``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from paged_infer.bench.options import Common
from paged_infer.bench.speed.cli import bench_of, errors, show
from paged_infer.cli_options import Without, with_option_groups

BATCHES = [1, 4, 16]
LOOKUP = {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
LONGEST_PROMPT = 96  # of ``story_beginnings``


@with_option_groups
def speculation(
    common: Annotated[
        Common,
        Without(
            speculative_config="each engine has its own",
            async_scheduling="drafts need the tokens of the step before, and the engine without drafts runs like them",
        ),
    ],
    num_speculative_tokens: Annotated[int, typer.Option(help="Most tokens drafted at a time.", min=1)] = 4,
    draft_model: Annotated[
        Path | None, typer.Option(help="A folder. Default: the storyteller's own; for another model, none.")
    ] = None,
    at_once: Annotated[list[int] | None, typer.Option(help="So many requests at once; may be repeated.", min=1)] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each request.", min=2)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
) -> None:
    """The same texts without drafts, with prompt lookup, and with a draft model: the share of drafts that
    are accepted, and the speed. For 1, 4 and 16 requests at once.

    Exits with status 1 if drafts change a token.
    """
    from paged_infer import storyteller
    from paged_infer.bench.speed.speculation import PLAIN, measure_speculation, open_texts
    from paged_infer.bench.workloads import story_beginnings

    methods: dict[str, dict[str, Any] | None] = {PLAIN: None, "ngram": {"method": "ngram", **LOOKUP}}
    folder = draft_model or (storyteller.DRAFT_PATH if common.model is None else None)
    if folder is not None:
        methods["draft model"] = {"method": "draft_model", "model": str(folder)}
    batches = at_once or BATCHES
    with errors(), ExitStack() as stack:
        engines = {
            name: stack.enter_context(
                common.open(
                    LONGEST_PROMPT + max_tokens,
                    gpu_memory_utilization=round(common.engine.gpu_memory_utilization / len(methods), 3),
                    async_scheduling=False,  # a step's drafts need the tokens of the step before
                    speculative_config=config and {**config, "num_speculative_tokens": num_speculative_tokens},
                )
            )
            for name, config in methods.items()
        }
        plain = engines[PLAIN]
        beginnings = story_beginnings(plain, max(batches), max_tokens, common.seed)
        workload = open_texts(beginnings, max_tokens, temperature)
        with bench_of(plain, common.repeats, common.repeats * len(engines) * len(batches)) as bench:
            report = measure_speculation(bench, engines, workload, batches)
    show(report, common.figures)
