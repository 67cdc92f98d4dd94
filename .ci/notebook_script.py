"""A notebook's code cells as a script, for a machine without Jupyter: ``python .ci/notebook_script.py NOTEBOOK``.

Cells run in order in one namespace, in the notebook's folder. Lines that only IPython understands (%magic, !shell) are
left out. What a cell displays, or ends with, is printed; a picture is saved as a PNG if ``--figures`` names a folder. A
cell that needs widgets is skipped where ipywidgets is missing, and one tagged raises-exception has to raise.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import linecache
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

JUPYTER_ONLY = ("IPython", "ipywidgets", "ipykernel", "traitlets", "anywidget")


@dataclass(frozen=True, slots=True)
class Cell:
    number: int  # of the code cells, from 1
    source: str
    tags: tuple[str, ...]


def code_cells(path: Path) -> list[Cell]:
    """The code cells that Python alone can run, without their magics."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = []
    for number, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), 1):
        source = "".join(cell["source"])
        if source.lstrip().startswith("%%"):
            continue
        lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in source.split("\n")]
        cells.append(Cell(number, "\n".join(lines), tuple(cell["metadata"].get("tags", ()))))
    return cells


class Displayed:
    """Stands in for IPython's display: prints, and keeps pictures as files."""

    def __init__(self, stem: str, figures: Path | None) -> None:
        self._stem, self._figures, self._num_pictures = stem, figures, 0

    def __call__(self, *values: Any, **_: Any) -> None:
        for value in values:
            png = value._repr_png_() if hasattr(value, "_repr_png_") else None
            if png is None:
                print(value)
                continue
            self._num_pictures += 1
            if self._figures is not None:
                self._figures.mkdir(parents=True, exist_ok=True)
                path = self._figures / f"{self._stem}-{self._num_pictures}.png"
                path.write_bytes(png)
                print(f"picture: {path}")


def run_notebook(path: Path, figures: Path | None = None) -> int:
    """Run every code cell; returns how many were passed over for want of Jupyter. What a cell raises comes through."""
    display = Displayed(path.stem, figures)
    _provide_ipython(display)
    namespace: dict[str, Any] = {"__name__": "__main__", "display": display}
    passed_over = 0
    with asyncio.Runner() as runner:
        for cell in code_cells(path):
            print(f"--- {path.name}, cell {cell.number}", flush=True)
            start = time.perf_counter()
            try:
                _run_cell(cell, f"{path.name}[{cell.number}]", namespace, runner, display)
            except ModuleNotFoundError as error:
                if (error.name or "").split(".")[0] not in JUPYTER_ONLY:
                    raise
                passed_over += 1
                print(f"passed over: {error}")
            except Exception as error:
                if "raises-exception" not in cell.tags:
                    raise
                print(f"raised, as it should: {type(error).__name__}: {error}")
            else:
                if "raises-exception" in cell.tags:
                    raise AssertionError(f"{path.name}, cell {cell.number}: it should have raised an exception")
            print(f"    {time.perf_counter() - start:.1f} s", flush=True)
    return passed_over


def _run_cell(cell: Cell, name: str, namespace: dict[str, Any], runner: asyncio.Runner, display: Displayed) -> None:
    """As a notebook does: an ``await`` may stand at the top, and the value of a last expression is shown."""
    lines = cell.source.splitlines(keepends=True)
    linecache.cache[name] = (len(cell.source), None, lines, name)  # so that a traceback shows them
    tree = ast.parse(cell.source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    _evaluate(compile(tree, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), namespace, runner)
    if isinstance(last, ast.Expr):
        code = compile(ast.Expression(last.value), name, "eval", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        value = _evaluate(code, namespace, runner)
        if value is not None and not cell.source.rstrip().endswith(";"):
            display(value)


def _evaluate(code: Any, namespace: dict[str, Any], runner: asyncio.Runner) -> Any:
    if not code.co_flags & inspect.CO_COROUTINE:
        return eval(code, namespace)

    async def evaluate() -> Any:
        return await eval(code, namespace)

    return runner.run(evaluate())


def _provide_ipython(display: Displayed) -> None:
    """``from IPython.display import display`` gives ours, whether IPython is installed or not."""
    module: Any
    try:
        import IPython.display as module
    except ImportError:
        package: Any = ModuleType("IPython")
        package.version_info, package.get_ipython = (9, 0, 0), lambda: None  # matplotlib asks for both
        module = package.display = ModuleType("IPython.display")
        for name in ("HTML", "Markdown", "Latex", "Image", "SVG", "Audio", "Video", "IFrame", "clear_output"):
            setattr(module, name, lambda *args, **options: args[0] if args else None)
        sys.modules |= {"IPython": package, "IPython.display": module}
    module.display = display


@app.command()
def main(
    notebook: Annotated[Path, typer.Argument(help="An .ipynb file.", exists=True, dir_okay=False)],
    figures: Annotated[Path | None, typer.Option(help="Folder for the pictures that it shows.")] = None,
) -> None:
    """Run the notebook's code cells as a script."""
    notebook, figures = notebook.resolve(), figures and figures.resolve()
    os.environ.setdefault("MPLBACKEND", "Agg")
    os.chdir(notebook.parent)
    sys.path.insert(0, str(notebook.parent))  # as in Jupyter: notebooks import the checkers beside them
    passed_over = run_notebook(notebook, figures)
    print(f"{notebook.name}: every cell ran" if not passed_over else f"{passed_over} cells passed over")


if __name__ == "__main__":
    app()
