"""Runs notebooks from top to bottom in a fresh kernel and stores their outputs: ``execute.py [--gpu] [NAME ...]``.

The executed .ipynb is the one source: edit its cells, run this, commit. Of a widget the picture beside it is kept and
nothing else: its state is large, and without a kernel Jupyter shows an error in its place. The kernel is named python3,
which every Jupyter has. The picture of the cell that is tagged "cover" is what README.md shows of a chapter, so it goes
to figures/, too.

``--gpu``, on a CUDA machine: the executed copies go to notebooks/gpu/, and the chapters keep the outputs of a CPU.
"""

from __future__ import annotations

import base64
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

HERE = Path(__file__).parent
FIGURES = HERE.parent / "figures" / "chapters"
GPU = HERE / "gpu"
LIMIT_S = 600  # ends a cell, or a kernel's start, that hangs
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def execute(path: Path) -> None:
    """Run ``path`` in its own folder and write it back normalised; a failing cell raises and leaves it unchanged."""
    notebook = run(path)
    nbformat.write(notebook, path)
    (FIGURES / f"{path.stem}.png").write_bytes(cover(notebook))


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with new outputs, and with nothing that differs from run to run for no reason."""
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
    return notebook


def execute_on_gpu(paths: list[Path]) -> None:
    """Run each and write it to ``GPU``. A chapter that fails keeps the copy that it had, and is named at the end.

    Raises:
        SystemExit: there is no CUDA device, or a chapter failed.
    """
    import torch

    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: the copies in notebooks/gpu/ are made on one; `make notebooks` runs anywhere")
    # the kernels start in notebooks/
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), os.getenv("PYTHONPATH"))))
    GPU.mkdir(exist_ok=True)
    failed = []
    for path in tqdm(paths, desc="notebooks on the GPU"):
        try:
            nbformat.write(from_one_folder_down(run(path)), GPU / path.name)
        except Exception as error:  # of a cell, or of the kernel: the other chapters do not depend on it
            failed.append(f"{path.name}: {str(error).strip().splitlines()[-1]}")
    if failed:
        sys.exit("\n".join(["these chapters failed on the GPU:", *failed]))


def from_one_folder_down(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Links of its prose to files lead up one folder, except those to chapters, whose copies lie beside it."""

    def lead_up(link: re.Match[str]) -> str:
        name = link[1].partition("#")[0]
        is_beside = not name or name.endswith(".ipynb") or not (HERE / name).exists()
        return link[0] if is_beside else f"](../{link[1]})"

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\(([^()\s]+)\)", lead_up, cell.source)
    return notebook


def cover(notebook: nbformat.NotebookNode) -> bytes:
    """The picture, as PNG, of the one cell that is tagged so."""
    (cell,) = (cell for cell in notebook.cells if "cover" in cell.metadata.get("tags", ()))
    (picture,) = (o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", ()))
    return base64.b64decode(picture)


def kernel() -> dict[str, str]:
    return {"display_name": "Python 3", "language": "python", "name": "python3"}


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if name != "--gpu"]
    paths = [HERE / Path(name).name for name in names] or sorted(HERE.glob("*.ipynb"))
    if "--gpu" in sys.argv[1:]:
        execute_on_gpu(paths)
    else:
        for path in tqdm(paths, desc="notebooks"):
            execute(path)
