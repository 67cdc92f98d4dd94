"""The command line: ``paged-infer serve | chat | generate | compare | info | bench | eval | quantize``."""

from __future__ import annotations

from typing import Annotated

import typer

import paged_infer
from paged_infer.bench import cli as bench_cli
from paged_infer.cli import chat, compare, generate, info, quantize
from paged_infer.cli_help import PLAIN, Command, in_order
from paged_infer.evaluation.cli import evaluate
from paged_infer.server.cli import serve
from paged_infer.terminal import CommandLine, replace_what_cannot_be_coded

ORDER = ("serve", "chat", "generate", "compare", "info", "bench", "eval", "quantize")

app = CommandLine(cls=in_order(*ORDER), **PLAIN)
app.add_typer(bench_cli.app, name="bench")
for command in (serve, chat.chat, generate.generate, compare.compare, info.info, quantize.quantize):
    app.command(cls=Command)(command)
app.command("eval", cls=Command)(evaluate)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"paged-infer {paged_infer.__version__}")
        raise typer.Exit


@app.callback()
def paged_infer_command(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """LLM inference, small enough to read and real enough to use. Each command has --help."""
    replace_what_cannot_be_coded()
