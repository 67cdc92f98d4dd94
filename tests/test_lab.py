"""`make lab` keeps the reader's work and the repository apart; `from checks import` works wherever Python starts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import execute
import lab
import nbformat
import pytest
from holding import LIMIT_S
from nbclient import NotebookClient

FOLDER = Path(lab.__file__).parent


@pytest.fixture
def course(tmp_path):
    """A small course: two chapters, a helper and a drawing."""
    for name in ("01_one.ipynb", "02_two.ipynb", "course.py", "diagrams/ladder.svg", "checks/ch01.py"):
        path = tmp_path / "notebooks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"first {name}")
    return tmp_path / "notebooks"


class TestTheCopy:
    def test_has_all_that_the_chapters_read(self):
        names = set(lab.files_of(FOLDER))
        chapters = {path.name for path in FOLDER.glob("*.ipynb")}
        assert chapters | {"course.py", "course_load.py", "GLOSSARY.md", "diagrams/ladder.svg"} <= names
        for folder in ("checks", "drawing", "solutions", "my_engine"):
            assert {f"{folder}/{path.name}" for path in (FOLDER / folder).glob("*.py")} <= names

    def test_is_of_the_repositorys_files(self, course):
        assert lab.update(course, course / "lab") == []
        for name in lab.files_of(course):
            assert (course / "lab" / name).read_text() == f"first {name}"

    def test_follows_the_repository_where_nothing_was_changed(self, course):
        lab.update(course, course / "lab")
        (course / "course.py").write_text("second")
        assert lab.update(course, course / "lab") == []
        assert (course / "lab" / "course.py").read_text() == "second"

    def test_keeps_what_was_changed_and_names_what_is_newer(self, course):
        lab.update(course, course / "lab")
        for name in ("01_one.ipynb", "02_two.ipynb"):
            (course / "lab" / name).write_text("mine")
        (course / "02_two.ipynb").write_text("second")
        for _ in range(2):
            assert lab.update(course, course / "lab") == ["02_two.ipynb"]
            assert (course / "lab" / "01_one.ipynb").read_text() == "mine"
            assert (course / "lab" / "02_two.ipynb").read_text() == "mine"

    def test_gets_a_deleted_file_anew(self, course):
        lab.update(course, course / "lab")
        (course / "lab" / "01_one.ipynb").write_text("mine")
        (course / "01_one.ipynb").write_text("second")
        (course / "lab" / "01_one.ipynb").unlink()
        assert lab.update(course, course / "lab") == []
        assert (course / "lab" / "01_one.ipynb").read_text() == "second"

    def test_of_a_newer_version_that_the_reader_has_already_is_followed_again(self, course):
        lab.update(course, course / "lab")
        for folder in (course, course / "lab"):
            (folder / "course.py").write_text("second")
        lab.update(course, course / "lab")
        (course / "course.py").write_text("third")
        assert lab.update(course, course / "lab") == []
        assert (course / "lab" / "course.py").read_text() == "third"

    def test_without_its_record_nothing_is_overwritten(self, course):
        lab.update(course, course / "lab")
        (course / "lab" / lab.MANIFEST).unlink()
        (course / "lab" / "course.py").write_text("mine")
        assert lab.update(course, course / "lab") == ["course.py"]
        assert (course / "lab" / "course.py").read_text() == "mine"

    def test_is_ignored_by_git(self):
        command = ["git", "check-ignore", "-q", str(lab.LAB / "01_tokens_to_text.ipynb")]
        found = subprocess.run(command, cwd=FOLDER, capture_output=True)
        if found.returncode == 128:
            pytest.skip("no git repository here")
        assert found.returncode == 0


def kernel_in(folder: Path, source: str, site: Path) -> str:
    """What a cell prints in a kernel that starts in that folder. ``site``: a folder with the path file."""
    (site / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(site)!r})\n")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    client = NotebookClient(
        notebook, timeout=LIMIT_S, startup_timeout=LIMIT_S, resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join((str(site), str(FOLDER.parent)))})
    return notebook.cells[0].outputs[0].text


@pytest.mark.parametrize("place", ["the root", "a folder elsewhere"])
def test_a_kernel_finds_the_courses_modules_wherever_it_starts(place, tmp_path):
    lab.add_to_path(tmp_path)
    folder = FOLDER.parent if place == "the root" else tmp_path
    source = """
        import checks, course, drawing, my_engine.states
        from checks import ch01
        print(course.__file__)"""
    assert Path(kernel_in(folder, source, tmp_path).strip()) == FOLDER / "course.py"


def test_a_kernel_in_the_copy_takes_the_copys_modules(course, tmp_path):
    lab.add_to_path(tmp_path)
    (course / "course.py").write_text("")
    lab.update(course, course / "lab")
    source = "import course\nprint(course.__file__)"
    assert Path(kernel_in(course / "lab", source, tmp_path).strip()) == course / "lab" / "course.py"


def test_without_jupyterlab_one_error_names_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(lab, "update", list)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="JupyterLab is not installed: pip install"):
        lab.main([])


class TestOnAGpu:
    def test_without_one_there_is_one_error_and_no_copy(self):
        command = [sys.executable, str(FOLDER / "execute.py"), "--gpu", "00_tour.ipynb"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
        assert result.returncode == 1 and result.stdout == ""
        assert result.stderr.startswith("no CUDA device here: ") and result.stderr.count("\n") == 1

    def test_the_copies_links_lead_where_the_chapters_do(self):
        text = "![a](diagrams/ladder.svg) [b](course.py) [c](01_tokens_to_text.ipynb) [d](https://a.b/c) `e[0](x)`"
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
        assert execute.from_one_folder_down(notebook).cells[0].source == text.replace(
            "(diagrams", "(../diagrams"
        ).replace("(course.py", "(../course.py")

    def test_nbval_passes_over_both_copies(self):
        code = compile((FOLDER / "conftest.py").read_text(), "conftest", "exec")
        exec(code, settings := {"__file__": str(FOLDER / "conftest.py")})
        assert {execute.GPU.name, lab.LAB.name} <= set(settings["collect_ignore"])
