"""A number in prose that speaks of a result is one that the chapter has printed, rounded to the digits of the prose."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from quoted import unquoted

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Numbers that are no results of a run: what is supposed, worked out on paper, or stands in a data sheet.
SUPPOSED = {
    "04": ["16 times as many tokens?"],
    "05": ["600 GB/s and computes 125 TFLOP/s", "99.5 %", "12 % longer", "from 18 to 57 %"],
    "06": ["2.6 µs", "745 µs", "3.3 ms", "Half as many warps", "0.05 µs"],
    "07": ["7 of 263", "read three times", "8 times k and v"],
    "09": ["done eight times", "25 GB/s", "31.5 GB/s"],
    "10": ["0.02 s a token", "its window of 5 s", "17 ms to read 26 GB", "2 % of the blocks"],
    "11": ["one every 10 ms", "sleeps 2 ms", "0.3 to 0.9 times the rate", "17 ms and 0.13 ms a token"],
    "12": ["six times, from its very first call"],
    "18": ["95 of 100 such samples"],
    "19": ["1.5 ms a step for the host", "1.5 ms a step nearly all", "takes 3.4 ms a step"],
    "20": ["holds a third of what they need"],
}


def supposed(path: Path) -> list[str]:
    return SUPPOSED.get(path.stem[:2], [])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_numbers_in_prose_have_been_printed(path):
    sentences = unquoted(nbformat.read(path, as_version=4))
    assert [one for one in sentences if not any(words in one for words in supposed(path))] == []
    assert [words for words in supposed(path) if not any(words in one for one in sentences)] == [], "needed no more"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("sentence", ["It takes 12.34 ms.", "That is 98.76 % longer.", "It is 76.5 times as fast."])
def test_a_number_that_nothing_has_printed_is_found_at_the_end_of_each_chapter(path, sentence):
    notebook = nbformat.read(path, as_version=4)
    ends = [i for i, cell in enumerate(notebook.cells) if "## Exercises" in cell.source] or [len(notebook.cells)]
    notebook.cells.insert(ends[0], nbformat.v4.new_markdown_cell(sentence))
    assert unquoted(notebook)[-1] == sentence


def chapter(printed: str, prose: str) -> nbformat.NotebookNode:
    output = nbformat.v4.new_output("stream", text=printed)
    code = nbformat.v4.new_code_cell("", outputs=[output])
    first, last = (nbformat.v4.new_markdown_cell(text) for text in ("# 99 · A chapter of 50 s", prose))
    return nbformat.v4.new_notebook(cells=[first, code, last])


@pytest.mark.parametrize(
    ("printed", "prose"),
    [
        ("a step: 1.221 ms, 2.98 times as long", "It takes 1.22 ms, about three times as long."),
        ("share 0.372", "It holds 37 % of them."),
        ("ratio 1.31", "A swapped request takes a third longer."),
        ("nothing", "By hand: 100 MB at 50 MB/s take 2 seconds."),
        ("nothing", "Kwon et al. (2023) measured 20 to 26 % more."),
        ("nothing", "| a table | 5 ms |"),
        ("12,345 tokens/s", "It reaches 12,345 tokens/s."),
    ],
)
def test_printed_numbers_worked_examples_and_papers_are_left_alone(printed, prose):
    assert unquoted(chapter(printed, prose)) == []


@pytest.mark.parametrize(
    ("printed", "prose"),
    [
        # sentences that stood in chapters whose pictures showed these numbers
        ("for eight 1.36 times", "A step for eight takes at most a quarter longer than a step for one."),
        ("for 64 5.51 times", "One for 64 takes about three times as long."),
        ("gathered 7.1x", "Gathering costs about three times as much."),
        ("blocks of 1: 1.52x, of 256: 0.63x", "Blocks of 1 cost twice what blocks of 16 do."),
        ("1.30 times", "It takes half as long again."),
        # and others like them
        ("a step: 1.231 ms", "It takes 1.22 ms."),
        ("3 requests", "It is three times as fast."),
        ("3.6 times", "It is about three times as fast."),
        ("ratio 1.1", "It takes a third longer."),
        ("a third: 1.6 times", "It takes a third longer."),
        ("20 % more", "It takes 20 to 26 % more."),
    ],
)
def test_other_digits_or_another_unit_are_not_enough(printed, prose):
    assert unquoted(chapter(printed, prose)) == [prose]
