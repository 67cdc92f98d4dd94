"""Runs notebooks from top to bottom in a fresh kernel and stores their outputs: ``execute.py [NAME ...]``.

The executed .ipynb is the one source: edit its cells, run this, commit. Of a widget the picture beside it is kept and
nothing else: its state is large, and without a kernel Jupyter shows an error in its place. The kernel is named python3,
which every Jupyter has. The picture of the cell that is tagged "cover" is what README.md shows of a chapter, so it goes
to figures/, too.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

HERE = Path(__file__).parent
FIGURES = HERE.parent / "figures" / "chapters"
LIMIT_S = 600  # ends a cell, or a kernel's start, that hangs
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def execute(path: Path) -> None:
    """Run ``path`` in its own folder and write it back normalised; a failing cell raises and leaves it unchanged."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel(), "language_info": {"name": "python"}})
    resources = {"metadata": {"path": HERE}}
    limits = {"timeout": LIMIT_S, "startup_timeout": LIMIT_S}
    NotebookClient(notebook, **limits, resources=resources, coalesce_streams=True).execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)  # when it ran
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", ()):
                output.data.pop(WIDGET_VIEW, None)
    nbformat.write(notebook, path)
    (FIGURES / f"{path.stem}.png").write_bytes(cover(notebook))


def cover(notebook: nbformat.NotebookNode) -> bytes:
    """The picture, as PNG, of the one cell that is tagged so."""
    (cell,) = (cell for cell in notebook.cells if "cover" in cell.metadata.get("tags", ()))
    (picture,) = (o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", ()))
    return base64.b64decode(picture)


def kernel() -> dict[str, str]:
    return {"display_name": "Python 3", "language": "python", "name": "python3"}


if __name__ == "__main__":
    paths = [HERE / Path(name).name for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    for path in tqdm(paths, desc="notebooks"):
        execute(path)
