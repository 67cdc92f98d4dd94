"""Stored outputs come from one clean run, which nbval holds the notebooks to; chapters have what chapters have."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from holding import LIMIT_S

FOLDER = Path(__file__).parent.parent / "notebooks"
README = FOLDER / "README.md"
GLOSSARY = FOLDER / "GLOSSARY.md"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if not path.stem.startswith("00")]  # the tour is no chapter
spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
assert spec is not None and spec.loader is not None
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)
REVISED = [
    "01_tokens_to_text",
    "02_attention",
    "03_decoder",
    "04_kv_cache",
    "05_prefill_decode_roofline",
    "06_triton",
    "07_flash_attention",
    "08_paged_kv_cache",
    "09_sharing_blocks",
    "10_continuous_batching",
    "11_engine",
    "12_naive_cached_paged",
    "13_speculation",
    "14_many_models",
    "15_fewer_bits",
    "16_one_model_two_processes",
    "17_answers_with_a_shape",
    "18_is_it_any_good",
    "19_predict_the_server",
    "20_from_here_to_vllm",
]
CELLS_AND_LINES = {
    # 10 has all policies on two clocks, 11 explains processes and threads from the ground, 14 holds MLA to the package
    # and counts in a trained mixture of experts, 12 ends with a real model, 15 rounds weights, activations, keys and
    # gradients, 16 has ranks, processes, links and replicas, 17 has masks, a stack, their laws, tools and
    # reasoning, 19 has a step, a server, its records, and six experiments
    "10_continuous_batching": (50, 310),
    "11_engine": (51, 350),
    "12_naive_cached_paged": (50, 280),
    "14_many_models": (50, 310),
    "15_fewer_bits": (54, 330),
    "16_one_model_two_processes": (52, 290),
    "17_answers_with_a_shape": (64, 390),
    "19_predict_the_server": (50, 280),
}
EACH_CHAPTER = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def prose(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def num_words(text: str) -> int:
    """Words of prose: no code, no formulas, no rules of tables."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$\n]+\$", " ", text, flags=re.DOTALL)
    return len([word for word in text.split() if re.search(r"[^\W\d_]", word)])


def rich_outputs(path: Path) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(path) for output in cell.outputs if "data" in output]


def test_there_is_a_tour_and_chapters_are_numbered_from_one():
    assert NOTEBOOKS[0].name == "00_tour.ipynb"
    assert len({path.stem[:2] for path in NOTEBOOKS}) == len(NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestStoredOutputs:
    def test_its_links_lead_to_files(self, path):
        text = "\n".join(
            cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"
        )
        for link in re.findall(r"\]\(([\w./#-]+)\)", text):
            assert (FOLDER / link.partition("#")[0]).exists(), link

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

    def test_readme_shows_the_picture_that_it_stores(self, path):
        """In half its width, and with words for those who do not see it."""
        picture = re.escape(f'<img src="../figures/chapters/{path.stem}.png" width="350" alt="')
        shown = re.findall(rf'{picture}([^"]*)"></a>', README.read_text("utf-8"))
        assert len(shown) == 1 and len(shown[0].split()) >= 3
        stored = (FOLDER.parent / "figures" / "chapters" / f"{path.stem}.png").read_bytes()
        assert stored == execute.cover(nbformat.read(path, as_version=4))

    def test_the_front_page_and_the_course_ask_its_question(self, path):
        """With the same words and the same minutes."""
        front = (FOLDER.parent / "README.md").read_text("utf-8")
        (question, minutes) = re.findall(rf"\(notebooks/{path.name}\) \| (.+) \| (\d+) \|", front)[0]
        (line,) = re.findall(rf"^.*\({path.name}\).*$", README.read_text("utf-8"), flags=re.MULTILINE)
        assert f"| {question} |" in line and line.endswith(f"| {minutes} |")

    def test_nothing_is_stored_that_a_reader_does_not_see(self, path):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        assert "widgets" not in notebook["metadata"]
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"
        assert path.stat().st_size < 1_000_000
        assert not any("widget-view" in kind for output in rich_outputs(path) for kind in output.data)

    def test_nothing_tells_of_the_machine_that_it_ran_on(self, path):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'"[^"]*(/home/|/root/|/tmp/|/usr/|site-packages)', text)

    def test_cells_are_short(self, path):
        for cell in code_cells(path):
            assert len([line for line in cell.source.splitlines() if line.strip()]) <= 15, cell.source

    def test_the_first_cell_says_what_for_with_what_and_how_long(self, path):
        first = nbformat.read(path, as_version=4).cells[0]
        assert first.cell_type == "markdown" and first.source.startswith(f"# {path.stem[:2]} · ")
        for heading in ("**Goals.**", "**Prerequisites.**", "**Run time.**"):
            assert heading in first.source, heading

    def test_the_end_says_what_was_learned_and_keeps_the_ledger(self, path):
        assert "## What you learned" in prose(path)
        tables = re.findall(r"^\|.*invariant.*\|$", prose(path), flags=re.MULTILINE)
        assert any(re.search(r"invariant.*wins.*loses.*trap", heads) for heads in tables)


@EACH_CHAPTER
class TestChapters:
    def test_its_prose_is_neither_thin_nor_long(self, path):
        assert 1500 <= num_words(prose(path)) <= 3000

    def test_it_cites_papers(self, path):
        assert len(set(re.findall(r"\b(?:19|20)\d\d\b", prose(path)))) >= 2

    def test_something_can_be_moved_and_a_picture_stands_there_without_a_kernel(self, path):
        words = ("Playground: ", "steps to explore")
        movable = [o for o in rich_outputs(path) if any(w in o.data.get("text/plain", "") for w in words)]
        assert movable and all("image/png" in output.data for output in movable)

    def test_pictures_are_of_a_size_to_read(self, path):
        pictures = [output.data["image/png"] for output in rich_outputs(path) if "image/png" in output.data]
        assert len(pictures) >= 3
        assert all(len(picture) < 120_000 for picture in pictures)

    def test_what_is_built_is_asserted_to_be_right(self, path):
        assert sum("assert " in cell.source for cell in code_cells(path)) >= 3

    def test_its_exercises_have_a_checker_and_solutions(self, path):
        name = f"ch{path.stem[:2]}.py"
        assert (FOLDER / "checks" / name).is_file() and (FOLDER / "solutions" / name).is_file()
        assert "## Exercises" in prose(path)


@pytest.mark.parametrize("name", REVISED)
class TestRevisedChapters:
    """The form that all chapters are to take; a chapter joins ``REVISED`` when it is rewritten."""

    def test_it_is_not_dense(self, name):
        path = FOLDER / f"{name}.ipynb"
        lines = [line for cell in code_cells(path) for line in cell.source.splitlines() if line.strip()]
        most_cells, most_lines = CELLS_AND_LINES.get(name, (48, 280))
        assert len(nbformat.read(path, as_version=4).cells) <= most_cells
        assert len(lines) <= most_lines
        assert not [line for line in lines if len(line) > 100]

    def test_it_opens_with_a_summary_and_honest_minutes(self, name):
        first = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells[0].source
        assert (
            len(re.findall(r"^- ", first.partition("**In short.**")[2].partition("**Goals.**")[0], re.MULTILINE)) == 3
        )
        assert re.search(r"Reading takes about \d+ minutes, with the exercises about\s", first)
        assert "**First reading.**" in first and "(can wait)" in prose(FOLDER / f"{name}.ipynb")

    def test_drawing_and_the_paged_interface_are_out_of_the_readers_way(self, name):
        source = "\n".join(cell.source for cell in code_cells(FOLDER / f"{name}.ipynb"))
        assert not re.search(r"new_picture|\baxes\.|matplotlib", source)
        if name < "08":  # which explains it
            assert not re.search(r"slot_mapping|block_tables|AttentionMetadata", source)

    def test_each_exercise_has_a_hint(self, name):
        exercises = prose(FOLDER / f"{name}.ipynb").partition("## Exercises")[2]
        assert exercises.count("<details><summary>Hint</summary>") == len(
            re.findall(r"^\*\*\d\. ", exercises, re.MULTILINE)
        )


class TestTheGlossary:
    ROWS = re.findall(
        r"^\| (.+?) \| (.+?) \| \[(\d\d)\]\((\w+\.ipynb)\) \|$", GLOSSARY.read_text("utf-8"), re.MULTILINE
    )

    def test_it_has_some_sixty_terms_in_order(self):
        terms = [term.lower() for term, *_ in self.ROWS]
        assert len(set(terms)) == len(terms) == GLOSSARY.read_text("utf-8").count("\n| ") - 1 >= 60
        assert terms == sorted(terms)

    def test_a_term_stands_in_the_chapter_that_is_named_for_it(self):
        for term, _, number, name in self.ROWS:
            assert name.startswith(number), term
            cells = nbformat.read(FOLDER / name, as_version=4).cells
            text = " ".join(" ".join(cell.source for cell in cells).lower().split())
            names = [word.strip() for word in re.split(r"[(),]", term.lower()) if word.strip()]
            assert any(word in text for word in names), f"{name} has nothing of: {term}"


def test_the_lines_of_the_package_that_chapter_07_quotes_stand_there():
    section = prose(FOLDER / "07_flash_attention.ipynb").partition("line by line")[2].partition("\n## ")[0]
    attention = FOLDER.parent / "paged_infer" / "kernels" / "attention"
    source = "".join((attention / name).read_text("utf-8") for name in ("flash_attention.py", "attention_tile.py"))
    quoted = re.findall(r"^- `(.+?)`:", section, re.MULTILINE | re.DOTALL)
    assert len(quoted) == 7
    assert [line for line in quoted if " ".join(line.split()) not in source] == []


def test_a_changed_output_makes_nbval_fail(tmp_path):
    """On a copy of a quick cell of chapter 01, its byte-pair merges by hand, with one digit changed."""
    notebook = nbformat.read(FOLDER / "01_tokens_to_text.ipynb", as_version=4)
    cells = [c for c in notebook.cells if "def merge(" in c.source]
    notebook.cells, (output,) = cells, cells[-1].outputs
    nbformat.write(notebook, tmp_path / "as_stored.ipynb")
    assert "the 3 " in output.text
    output.text = output.text.replace("the 3 ", "the 4 ")
    nbformat.write(notebook, tmp_path / "changed.ipynb")
    for name in ("conftest.py", "sanitize.cfg", "checks"):
        source = FOLDER / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)

    def nbval(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "--nbval", "-q", "-p", "no:cacheprovider", f"{name}.ipynb"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S)

    stored, changed = nbval("as_stored"), nbval("changed")
    assert stored.returncode == 0, stored.stdout
    assert changed.returncode == 1 and "1 failed" in changed.stdout, changed.stdout


def test_each_cover_in_figures_is_a_chapters():
    covers = {path.stem for path in (FOLDER.parent / "figures" / "chapters").iterdir()}
    assert covers == {path.stem for path in NOTEBOOKS}
