"""``paged-infer quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paged_infer.cli_options import ModelOption, quiet_libraries
from paged_infer.terminal import fail

MIB = 2**20


def quantize(
    first: Annotated[str, typer.Argument(metavar="MODEL", help="The model to quantise; omitted with --model.")],
    second: Annotated[
        str | None, typer.Argument(metavar="OUT", help="Folder for the quantised model; it must be new or empty.")
    ] = None,
    model: ModelOption = None,
    scheme: Annotated[str, typer.Option(help="w4a16, w8a16, or w8a8, which quantises activations, too.")] = "w4a16",
    method: Annotated[str, typer.Option(help="rtn, gptq, awq or smoothquant.")] = "rtn",
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale; default: 32 for w4a16, else a row.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="A text file, or stories (the storyteller's default); needed by --keep-wide and all methods but rtn."
        ),
    ] = None,
    keep_wide: Annotated[
        float, typer.Option(help="Share of the weights, 0 to 1, to leave unquantised in the most sensitive layers.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed that chooses the calibration texts.", min=0)] = 0,
) -> None:
    """Quantise a model's weights, and write it in compressed-tensors' format, which transformers and vLLM load, too.

    A mixture of experts takes rtn or gptq; in w8a8 transformers does not load it.
    """
    if (model is None) == (second is None):
        fail(ValueError(f"{first!r}{f' {second!r}' * bool(second)}: give MODEL and OUT, or --model MODEL and OUT"))
    name, out = model or first, Path(second or first)
    from tqdm import tqdm

    from paged_infer.quantize import quantize as quantize_model

    quiet_libraries()
    bar = tqdm(unit="layer", leave=False, desc=method, disable=None)
    try:
        with bar:
            report = quantize_model(
                name,
                out,
                scheme=scheme,
                method=method,
                group_size=group_size,
                calibration=calibration,
                keep_wide=keep_wide,
                seed=seed,
                on_start=bar.reset,
                on_layer=bar.update,
            )
    except ValueError as error:
        fail(error)
    bits = 8 * report.quantised_bytes / report.num_quantised
    size = f"{report.quantised_bytes / MIB:,.1f} MiB"
    typer.echo(f"{report.num_quantised:,} weights in {size}, {bits:.2f} bits per weight with scales")
    tied = "; the head is tied to the embedding, so it stays as it is" if report.is_tied else ", the head included"
    typer.echo(f"{report.num_parameters - report.num_quantised:,} other parameters are not quantised{tied}")
    if report.wide:
        typer.echo(f"left unquantised by --keep-wide: {', '.join(report.wide)}")
