"""Numbers in a chapter's prose that speak of results, and whether the chapter has printed them before."""

from __future__ import annotations

import re
from collections.abc import Iterator

import nbformat

SMALL = dict(zip("two three four five six seven eight nine ten".split(), range(2, 11), strict=True))
PARTS = {"half": 1 / 2, "halves": 1 / 2, "third": 1 / 3, "quarter": 1 / 4, "fifth": 1 / 5, "sixth": 1 / 6, "tenth": 0.1}
COUNTS = {"a": 1, "one": 1, **SMALL}
UNITS = {  # in prose -> what marks the same unit in printed text
    r"%|per ?cent": r"%|share",
    r"times|×|x": r"times|×|\dx|ratio",
    r"[µm]?s|(?:micro|milli)?seconds?": r"\b[µm]?s\b|second",
    r"tokens/s|tokens a second|[MGT]B/s|[TG]?FLOP/s": r"/s|a second",
}
NUMBER = r"\d[\d,]*(?:\.\d+)?|\b(?:" + "|".join(SMALL) + ")"
QUANTITIES = {
    re.compile(rf"(?<![\w.^/$-])({NUMBER})(?:\s(?:to|and|or)\s({NUMBER}))?\s?(?:{unit})(?![\w/])(?!\s\d)", re.I): mark
    for unit, mark in UNITS.items()
}
COMPARED = r"\s(?:as\s|what\b|of\swhat\b|again\b|longer|shorter|faster|slower|more\b|less\b|cheaper|higher|lower)"
FRACTION = re.compile(rf"\b({'|'.join(COUNTS)})\s({'|'.join(PARTS)})s?(?:\sto\s\S+(?:\s\w+)?)?{COMPARED}", re.I)
DOUBLE = re.compile(rf"\b(twice|half){COMPARED}", re.I)
WINDOW = 6  # code cells
NEAR = 0.04  # a third may be 0.30 or 0.37


def unquoted(notebook: nbformat.NotebookNode) -> list[str]:
    """The sentences with such a number that none of the last ``WINDOW`` code cells has printed.

    Not looked at are the first cell, tables, exercises, sentences that are worked "by hand" or in a paragraph that is,
    and those that cite a paper by its year.
    """
    printed, found = [], []
    for cell in notebook.cells[1:]:
        if cell.cell_type == "code":
            printed.append("\n".join(text_of(output) for output in cell.outputs))
        elif "## Exercises" in cell.source:
            break
        elif printed:
            near = printed[-WINDOW:]
            found += [s for s in sentences(cell.source) if not all(is_printed(*claim, near) for claim in claims(s))]
    return found


def text_of(output: nbformat.NotebookNode) -> str:
    return output.get("text", "") or output.get("data", {}).get("text/plain", "")


def sentences(source: str) -> Iterator[str]:
    source = re.sub(r"```.*?```|\$\$.*?\$\$|<details>.*?</details>", " ", source, flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n|\n(?=- |\d\. )", source):
        if paragraph.startswith(("|", "#")) or re.search(r"\bby\s+hand\b", paragraph, re.I):
            continue
        text = " ".join(re.sub(r"\$[^$\n]+\$|`[^`]*`|\]\([^)]*\)", "@", paragraph).split())
        for sentence in re.split(r"(?<=[.?!:;])\s(?=[A-Z*(])", text):
            if not re.search(r"\b(?:19|20)\d\d\b", sentence):
                yield sentence


def claims(sentence: str) -> Iterator[tuple[list[float], int, str]]:
    """(values of which one must have been printed, their decimal places or -1, mark of the unit) of each number."""
    for pattern, mark in QUANTITIES.items():
        for numbers in pattern.findall(sentence):
            for number in filter(None, numbers):
                digits = str(SMALL.get(number.lower(), number)).replace(",", "")
                yield [float(digits)], len(digits.partition(".")[2]), mark
    for count, part in FRACTION.findall(sentence):
        value = COUNTS[count.lower()] * PARTS[part.lower()]
        yield [value, 1 + value, 1 - value], -1, UNITS[r"times|×|x"] + r"|%"
    for word in DOUBLE.findall(sentence):
        yield [2.0 if word.lower() == "twice" else 0.5], -1, UNITS[r"times|×|x"] + r"|%"


def is_printed(values: list[float], places: int, mark: str, printed: list[str]) -> bool:
    """Of times and shares, the line has the unit; of seconds and rates the output, which may be a table."""
    by_line = "times" in mark or "%" in mark
    for text in (line for output in printed for line in (output.splitlines() if by_line else [output])):
        if re.search(mark, text):
            for number, per_cent in re.findall(r"(\d[\d,]*(?:\.\d+)?)(\s?%)?", text):
                found = float(number.replace(",", "")) / (100 if per_cent else 1)
                if places < 0:
                    if any(abs(value - found) <= NEAR * max(1.0, value) for value in values):
                        return True
                elif f"{found * (100 if '%' in mark else 1):.{places}f}" == f"{values[0]:.{places}f}":
                    return True
    return False
