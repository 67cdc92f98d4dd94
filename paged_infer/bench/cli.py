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
from paged_infer.cli_help import PLAIN, Command, in_order

ORDER = ("ladder", "throughput", "latency", "load", "serve", "policies", "memory", "kernels")  # the front page's

app = typer.Typer(cls=in_order(*ORDER), **PLAIN)


@app.callback()
def bench() -> None:
    """Measurements, compared with what you would use instead."""


app.add_typer(speed_cli.app)  # without a name: its commands are commands of ours
for command in (serve_cli.serve, kernels, parallel, peers, quantisation, simulate):
    app.command(cls=Command)(command)
app.add_typer(control_cli.app)
