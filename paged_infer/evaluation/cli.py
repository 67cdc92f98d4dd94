"""``paged-infer eval``."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paged_infer.cli_options import EngineOfText, Model, open_llm, quiet_libraries, with_option_groups
from paged_infer.terminal import console, fail

if TYPE_CHECKING:
    from paged_infer.evaluation.models import EvaluatedModel, InProcess
    from paged_infer.evaluation.report import Report

MOST_ITEMS = 100_000
FILE_WIDTH = 160  # columns, if the output is not a terminal


@with_option_groups
def evaluate(
    engine: EngineOfText,
    model: Model = None,
    tasks: Annotated[
        str, typer.Option(help="recall, choice, ending, sums, sums_worked, perplexity; separated by commas.")
    ] = "recall,choice,perplexity",
    limit: Annotated[int, typer.Option(help="Items of each task.", min=1, max=MOST_ITEMS)] = 100,
    num_fewshot: Annotated[
        int, typer.Option(help="Examples with their answers before each question.", min=0, max=100)
    ] = 0,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask in a chat, instead of with a text to complete.")
    ] = False,
    schemes: Annotated[
        str, typer.Option(help="A column for each: float32, bfloat16, w8a16, w4a16 ...; separated by commas.")
    ] = "",
    ranks: Annotated[str, typer.Option(help="A column for each tensor_parallel_size, such as 1,2.")] = "",
    reference: Annotated[
        str | None,
        typer.Option(help="A model that the others are compared with, in float32. Default: the first column."),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Evaluate the server at this URL (/v1/completions); MODEL is its tokenizer.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the items, whose texts are made from the grammar.", min=0, max=499)
    ] = 0,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all numbers, item by item.")] = None,
    write_tasks: Annotated[
        Path | None, typer.Option(help="Write the tasks for lm-eval into this folder, and evaluate nothing.")
    ] = None,
) -> None:
    """How good is it? Tasks made from the storyteller's grammar, with error bars, and differences between models.

    Perplexity also gives KL and top-1 agreement with the first column.
    """
    quiet_libraries()
    from paged_infer.evaluation.report import Settings
    from paged_infer.evaluation.report import evaluate as evaluate_models
    from paged_infer.evaluation.tasks import read_tasks

    try:
        chosen = read_tasks(tasks)
        settings = Settings(limit, seed, num_fewshot, apply_chat_template)
        if output is not None:
            _check_output(output)
        if write_tasks is not None:
            from paged_infer.evaluation.harness_tasks import write_harness_tasks

            try:
                for path in write_harness_tasks(write_tasks, chosen, settings):
                    typer.echo(path)
            except OSError as error:
                raise ValueError(f"write_tasks={write_tasks}: {error.strerror}") from None
            return
        models = _models(model, dict(engine.options), schemes, ranks, reference, base_url)
        with console.status("") as status:
            report = evaluate_models(
                models, chosen, settings, on_task=lambda name, task: status.update(f"{name}: {task}")
            )
        if output is not None:
            report.save(output)
    except ValueError as error:
        fail(error)
    show(report)
    if output is not None:
        typer.echo(f"numbers: {output}")


def _check_output(path: Path) -> None:
    """Raises ValueError now, rather than when everything has been measured."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output={path}: {error.strerror}") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"output={path}: cannot be written")


def _models(
    model: str | None, options: dict[str, Any], schemes: str, ranks: str, reference: str | None, base_url: str | None
) -> dict[str, Callable[[], EvaluatedModel]]:
    """Name -> the function that opens the model; first the one that the others are compared with."""
    from paged_infer.evaluation.report import variants

    chosen = variants(_split(schemes), [_count(one) for one in _split(ranks)])
    if base_url is not None:
        if chosen or reference or options:
            raise ValueError(f"base_url={base_url!r}: a server has its own engine; leave out the engine's options")
        return {base_url: partial(_open_server, model, base_url)}
    found: dict[str, Callable[[], EvaluatedModel]] = {}
    if reference is not None:
        found[f"{reference} (reference)"] = partial(_open, reference, {"dtype": "float32"})
    for name, own in (chosen or {model or "storyteller": {}}).items():
        found[name] = partial(_open, model, {**options, **own})
    return found


def _open(model: str | None, options: dict[str, Any]) -> InProcess:
    from paged_infer.evaluation.models import InProcess

    return InProcess(open_llm(model, **options))


def _open_server(model: str | None, base_url: str) -> EvaluatedModel:
    from paged_infer.evaluation.models import OverHttp
    from paged_infer.model.loading.hub import resolve_model
    from paged_infer.text.tokenizer import Tokenizer

    return OverHttp(base_url, Tokenizer.from_pretrained(resolve_model(model or "storyteller")))


def _split(text: str) -> list[str]:
    return [one.strip() for one in text.split(",") if one.strip()]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"ranks={text!r}: must be numbers of at least 1, separated by commas")
    return int(text)


def show(report: Report) -> None:
    """Print a table of values, one of differences from the first column, and the right answers by kind of question."""
    from rich.console import Console
    from rich.table import Table

    out = console if console.is_terminal else Console(width=FILE_WIDTH)
    first, *others = report.scores
    tables = [("value, 95 % interval", [first, *others], report.rows())]
    if others:
        tables.append((f"compared with {first}, on the same items", others, report.difference_rows()))
    for title, names, rows in tables:
        out.print(f"[bold]{title}[/bold]", highlight=False)
        table = Table("", *names, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        out.print(table, "", highlight=False)
    for task, found in report.scores[first].items():
        if kinds := found.by_kind():
            counts = ", ".join(f"{kind} {right}/{asked}" for kind, (right, asked) in kinds.items())
            out.print(f"{task} of {first}: {counts}", highlight=False)
