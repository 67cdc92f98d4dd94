"""Stored outputs come from one clean run, and are what nbval holds the notebooks to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def test_there_is_a_tour():
    assert "00_tour.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestStoredOutputs:
    def test_cells_were_run_once_from_top_to_bottom(self, path):
        counts = [cell.execution_count for cell in code_cells(path)]
        assert counts == list(range(1, len(counts) + 1))

    def test_no_cell_failed(self, path):
        for cell in code_cells(path):
            expected = "raises-exception" in cell.metadata.get("tags", [])
            assert expected or all(output.output_type != "error" for output in cell.outputs), cell.source

    def test_something_is_printed_for_nbval_to_compare(self, path):
        texts = [o.text for cell in code_cells(path) for o in cell.outputs if o.output_type == "stream"]
        assert len(texts) >= 3

    def test_nothing_is_stored_that_a_reader_does_not_see(self, path):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        assert "widgets" not in notebook["metadata"]
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"
        assert path.stat().st_size < 1_000_000

    def test_cells_are_short(self, path):
        for cell in code_cells(path):
            assert len([line for line in cell.source.splitlines() if line.strip()]) <= 15, cell.source


def test_nbval_notices_a_changed_output(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(6 * 7)", execution_count=1)])
    for name, text in (("right", "42\n"), ("wrong", "43\n")):
        notebook.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    for name in ("conftest.py", "sanitize.cfg"):
        (tmp_path / name).write_text((FOLDER / name).read_text(encoding="utf-8"), encoding="utf-8")

    def nbval(name: str) -> int:
        command = [sys.executable, "-m", "pytest", "--nbval", "-q", "-p", "no:cacheprovider", f"{name}.ipynb"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120).returncode

    assert nbval("right") == 0
    assert nbval("wrong") == 1
