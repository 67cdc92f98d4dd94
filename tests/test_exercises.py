"""Every exercise has a solution that its checker accepts, and two wrong answers that it rejects, naming the fault."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from checks import Checker, Wrong, is_attempted
from holding import LIMIT_S
from nbclient import NotebookClient
from planted import Planted

FOLDER = Path(__file__).parent.parent / "notebooks"
CHAPTERS = sorted(path.stem for path in (FOLDER / "checks").glob("ch*.py"))


def of_kind(module: ModuleType, kind: type) -> list:
    return [value for value in vars(module).values() if isinstance(value, kind)]


EXERCISES = [(c, e) for c in CHAPTERS for e in of_kind(import_module(f"checks.{c}"), Checker)]
PLANTED = [(c, p) for c in CHAPTERS for p in of_kind(import_module(f"exercises.{c}"), Planted)]
EACH_EXERCISE = pytest.mark.parametrize(
    ("chapter", "exercise"), EXERCISES, ids=[f"{chapter}-{exercise.name}" for chapter, exercise in EXERCISES]
)


@EACH_EXERCISE
def test_the_solution_is_right(chapter, exercise, capsys):
    exercise(getattr(import_module(f"solutions.{chapter}"), exercise.name))
    *measured, verdict = capsys.readouterr().out.splitlines()
    assert verdict == f"{exercise.name}: right"
    assert not measured or exercise.name == "capstone"  # which is measured, too


@EACH_EXERCISE
def test_two_wrong_answers_are_planted_for_each_exercise(chapter, exercise):
    faults = [p.fault for c, p in PLANTED if c == chapter and p.exercise == exercise.name]
    assert len(set(faults)) >= 2


@pytest.mark.parametrize(("chapter", "planted"), PLANTED, ids=[f"{c}-{p.exercise}-{p.name}" for c, p in PLANTED])
def test_a_wrong_answer_is_rejected_with_its_fault_named(chapter, planted, capsys):
    exercise = getattr(import_module(f"checks.{chapter}"), planted.exercise)
    with pytest.raises(Wrong) as raised:
        exercise(planted.answer)
    sentence = str(raised.value)
    assert re.search(planted.fault, sentence), sentence
    assert "right" not in capsys.readouterr().out


@EACH_EXERCISE
def test_the_chapter_asks_it_with_nothing_attempted(chapter, exercise):
    (path,) = FOLDER.glob(f"{chapter[2:]}_*.ipynb")
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    asking = [cell for cell in cells if f"{chapter}.{exercise.name}({exercise.name})" in cell.source]
    assert len(asking) == 1
    assert asking[0].outputs[0].text == f"{exercise.name}: not attempted yet\n"


@EACH_EXERCISE
def test_a_stub_replaces_nothing_that_the_chapter_has_built(chapter, exercise):
    """A playground's slider may be moved after the last cell has run: what it calls must still be what it was."""
    (path,) = FOLDER.glob(f"{chapter[2:]}_*.ipynb")
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    defined = rf"^(?:def|class) {exercise.name}\b|^{exercise.name} *="
    assert sum(re.search(defined, source, flags=re.MULTILINE) is not None for source in cells) == 1


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_has_three_to_five_exercises(chapter):
    assert 3 <= len([exercise for c, exercise in EXERCISES if c == chapter]) <= 5


class TestAttempts:
    def test_a_stub_is_no_attempt(self):
        def dots(x): ...
        def words(x):
            """What to do."""
            ...  # noqa: PIE790 - as the notebooks write it

        def returns_dots(x):
            return ...

        class Stub:
            limit = 4

            def plan(self, step):
                """What to do."""

        assert not any(is_attempted(answer) for answer in (None, ..., dots, words, returns_dots, Stub))

    def test_anything_else_is(self):
        def same(x):
            return x

        def five(x):
            return 5

        def forgot_return(x):
            x + 1

        class Some:
            def plan(self, step):
                step.schedule_running()

        assert all(is_attempted(answer) for answer in (0, "", [], False, same, five, forgot_return, Some))


def test_a_notebook_shows_the_sentence_and_not_the_checkers_code():
    source = "from checks import expect\nexpect(False, 'row 2 is not a probability: it sums to 3')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    limits = {"timeout": LIMIT_S, "startup_timeout": LIMIT_S}
    NotebookClient(notebook, **limits, allow_errors=True, resources={"metadata": {"path": FOLDER}}).execute()
    assert notebook.cells[0].outputs[0].traceback == ["Not right yet: row 2 is not a probability: it sums to 3"]


class TestExceptionsOfAnAnswer:
    """A notebook shows the answer's own lines, without those of the checker, of torch or of Triton's interpreter."""

    def shown(self, *sources):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        limits = {"timeout": LIMIT_S, "startup_timeout": LIMIT_S}
        NotebookClient(notebook, **limits, allow_errors=True, resources={"metadata": {"path": FOLDER}}).execute()
        return notebook.cells[-1].outputs[0].traceback

    def test_the_lines_that_led_to_it_are_shown(self):
        answer = "def tenth(x):\n    return x[9]\n\ndef merge_states(left, right):\n    return tenth(left[0])"
        assert self.shown(answer, "from checks import ch07\nch07.merge_states(merge_states)") == [
            "The answer raises IndexError: index 9 is out of bounds for dimension 0 with size 5",
            "  in merge_states, line 2: return tenth(left[0])",
            "  in tenth, line 2: return x[9]",
        ]

    def test_of_a_kernel_the_cause_is_shown(self):
        kernel = """
from paged_infer.kernels.triton_runtime import launch, tl, triton

@triton.jit
def add_one(x_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(x_ptr + place, tl.load(x_ptr + place) + one)

def row_softmax(x):
    launch(add_one, (1,), x, BLOCK=2)
    return x
"""
        lines = self.shown(kernel, "from checks import ch06\nch06.row_softmax(row_softmax)")
        assert "NameError" in lines[0] and "one" in lines[0]
        assert any("row_softmax" in line for line in lines[1:]) and len(lines) <= 5

    def test_where_the_answer_has_no_line_in_it_the_checker_gave_up(self):
        asked = "from checks import ch07\nch07.key_tiles(lambda *args: 5)"
        assert self.shown(asked) == ["The answer cannot be checked: TypeError: 'int' object is not iterable"]

    def test_elsewhere_it_is_the_exception_that_it_was(self):
        def fails(*args):
            raise LookupError("of the answer")

        with pytest.raises(LookupError, match="of the answer"):
            import_module("checks.ch07").key_tiles(fails)
