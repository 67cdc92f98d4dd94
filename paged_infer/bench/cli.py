"""``paged-infer bench``: the commands of all benches."""

from __future__ import annotations

import typer

from paged_infer.bench.http import cli as serve_cli
from paged_infer.bench.kernels.cli import kernels
from paged_infer.bench.parallel.cli import parallel
from paged_infer.bench.quantisation.cli import quantisation
from paged_infer.bench.scheduling import cli as control_cli
from paged_infer.bench.side_by_side.cli import peers
from paged_infer.bench.simulation.cli import simulate
from paged_infer.bench.speed import cli as speed_cli

app = typer.Typer(help="Measurements, compared to what one would use instead.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measurements, compared to what one would use instead."""


app.add_typer(speed_cli.app)  # without a name: its commands are commands of ours
app.command()(serve_cli.serve)
app.command()(kernels)
app.command()(parallel)
app.command()(peers)
app.command()(quantisation)
app.command()(simulate)
app.add_typer(control_cli.app)
