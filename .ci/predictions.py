"""What a first GPU run was predicted to give, beside what it gave.

    PYTHONPATH=. python .ci/predictions.py FOLDER

figures/gpu-predictions.json was written before any kernel had run on a GPU. Each entry has a range, a target and the
reasoning; a measurement outside the range shows that a step of the reasoning was wrong. FOLDER has bench-kernels.json
and bench-throughput.json: it is ``figures`` in the tar of ``make gpu``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from paged_infer.bench.kernels.report import KernelReport
from paged_infer.bench.speed.measure import ENGINE, SpeedReport
from paged_infer.bench.tables import plain_table

PREDICTIONS = Path(__file__).resolve().parents[1] / "figures" / "gpu-predictions.json"


@dataclass(frozen=True, slots=True)
class Prediction:
    """One number: between ``low`` and ``high``, for the reason ``why``; ``target`` is what the project aims at."""

    what: str
    unit: str
    low: float
    high: float
    target: float | None
    measure: dict[str, Any]  # where the measured value is: see ``measured``
    why: str


def read_predictions(path: Path = PREDICTIONS) -> list[Prediction]:
    return [Prediction(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["predictions"]]


def measured(measure: dict[str, Any], folder: Path) -> float | None:
    """The value in the reports of ``folder``; None if it was not measured.

    ``report`` names the file. ``rate`` is a field of its roofline; ``metric`` one of the engine's metrics of ``model``;
    ``group`` and ``sizes`` choose a kernel measurement: operations a second of ``kernel``, or its speed over that of
    ``over``, another kernel or "copy".
    """
    path = folder / f"{measure['report']}.json"
    if not path.exists():
        return None
    if "metric" in measure:
        speed = SpeedReport.read(path)
        value: float | None = getattr(speed[ENGINE].metrics, measure["metric"])
        return value if speed.model == measure["model"] else None
    report = KernelReport.read(path)
    if "rate" in measure:
        return None if report.roofline is None else getattr(report.roofline, measure["rate"])
    kernel, over = measure["kernel"], measure.get("over")
    for found in report.group(measure["group"], **measure["sizes"]):
        if over is None:
            return found.rate(kernel)
        return report.share_of_copy(found, kernel) if over == "copy" else found.ratio(kernel, over)
    return None


def comparison(folder: Path, predictions: list[Prediction] | None = None) -> str:
    """A table: predicted, target, measured, and whether the measurement is in the range."""
    predictions = read_predictions() if predictions is None else predictions
    header = ("", "predicted", "target", "measured", "")
    return plain_table("predictions:", header, list(_rows(folder, predictions)))


def _rows(folder: Path, predictions: list[Prediction]) -> Iterator[tuple[str, ...]]:
    for one in predictions:
        value = measured(one.measure, folder)
        expected, target = f"{one.low:g} to {one.high:g} {one.unit}", "-" if one.target is None else f"{one.target:g}"
        if value is None:
            yield one.what, expected, target, "-", "not measured"
            continue
        value /= one.measure.get("scale", 1)
        verdict = "below" if value < one.low else "above" if value > one.high else "as predicted"
        yield one.what, expected, target, f"{value:.3g}", verdict


def main(folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)]) -> None:
    """Print figures/gpu-predictions.json beside the numbers of FOLDER."""
    print(comparison(folder))


if __name__ == "__main__":
    typer.run(main)
