"""``paged-infer bench``: the commands of all benches."""

from __future__ import annotations

import typer

from paged_infer.bench import control_cli, serve_cli, speculation_cli, speed_cli, step_cli
from paged_infer.bench.kernels_cli import kernels

app = typer.Typer(help="Measurements beside what a user would pick instead.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measurements beside what a user would pick instead."""


app.add_typer(speed_cli.app)  # without a name: its commands are commands of ours
app.command()(step_cli.step)
app.command()(speculation_cli.speculation)
app.command()(serve_cli.serve)
app.command()(kernels)
app.add_typer(control_cli.app)
