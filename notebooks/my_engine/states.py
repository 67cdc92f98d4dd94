"""What the engine is after each chapter, by the marks in its files. This file is no part of the engine.

``# CHAPTER 08``, the first line of a file, names the chapter that writes it. A line that ends in ``# NEW 09`` is added
in chapter 09, and so are those from a line ``# NEW 09`` to a line ``# END 09``. What follows a colon stays as
a comment. Chapters add and never replace: a state is the lines written so far.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import difflib
import importlib.util
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

from paged_infer import LLM, SamplingParams, storyteller

from . import lent

HERE = Path(__file__).parent
FILES = sorted({path.name for path in HERE.glob("*.py")} - {"__main__.py", "lent.py", "states.py"})
LAST = 20
MARK = re.compile(r"( *)(.*?) *# (NEW|END) (\d\d)(?:: (.+))?")
PROMPTS = ["Once upon a time", "A story about Mia and a red key. Mia found", "One day, Tom and his dog went to the"]


def marked_lines(text: str) -> Iterator[tuple[str, int]]:
    """The lines without their marks, each with the chapter that writes it. A mark out of place is a ValueError."""
    first, *rest = text.splitlines()
    own, region = int(first.removeprefix("# CHAPTER ")), None
    for number, line in enumerate(rest, 2):
        mark = MARK.fullmatch(line)
        if mark is None:
            if re.search(r"# (NEW|END|CHAPTER)\b", line):
                raise ValueError(f"line {number} is no mark: {line.strip()}")
            yield line, region or own
            continue
        indent, code, kind, chapter, why = *mark.groups()[:3], int(mark[4]), mark[5]
        if not (chapter == region and not code if kind == "END" else region is None and chapter > own):
            raise ValueError(f"line {number} is out of place in chapter {region or own:02}: {line.strip()}")
        if code or why:
            yield indent + "  ".join([code] * bool(code) + [f"# {why}"] * bool(why)), chapter
        if not code:
            region = chapter if kind == "NEW" else None
    if region is not None:
        raise ValueError(f"END {region:02} is missing")


def state_lines(name: str, chapter: int) -> list[tuple[str, int]]:
    """The lines of a file after this chapter, each with the chapter that wrote it; none if that comes later."""
    kept: list[tuple[str, int]] = []
    for line, written in marked_lines((HERE / name).read_text("utf-8")):
        if written <= chapter:
            most = 1 if line.startswith(" ") else 2  # blank lines before it
            while line and [text for text, _ in kept[-most - 1 :]] == [""] * (most + 1):
                kept.pop()
            kept.append((line, written))
    while kept and not kept[-1][0]:
        kept.pop()
    return kept


def source(name: str, chapter: int) -> str:
    """The text of a file after this chapter."""
    return "".join(f"{line}\n" for line, _ in state_lines(name, chapter))


def load(chapter: int) -> ModuleType:
    """The engine after this chapter, as a package of its own."""
    return _package(chapter, tuple((name, text) for name in FILES if (text := source(name, chapter))))


@cache
def _package(chapter: int, sources: tuple[tuple[str, str], ...]) -> ModuleType:
    folder = Path(tempfile.mkdtemp(prefix=f"my_engine_{chapter:02}_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, text in sources:
        (folder / name).write_text(text, "utf-8")
    place = {"submodule_search_locations": [str(folder)]}
    spec = importlib.util.spec_from_file_location(folder.name, folder / "__init__.py", **place)
    module = sys.modules[folder.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def show(name: str, chapter: int, part: str | None = None) -> None:
    """Print a file, or a part such as ``BlockManager.allocate``, after this chapter; + marks what the chapter adds."""
    node = ast.parse(source(name, chapter))
    for wanted in part.split(".") if part else ():
        node = next(child for child in node.body if getattr(child, "name", None) == wanted)
    first, last = (min(n.lineno for n in [node, *node.decorator_list]) - 1, node.end_lineno) if part else (0, None)
    for line, written in state_lines(name, chapter)[first:last]:
        print(f"{'+' if line and written == chapter else ' '} {line}".rstrip())


def diff(chapter: int) -> str:
    """What the chapter adds, as a unified diff."""
    lines = []
    for name in FILES:
        before, after = (source(name, state).splitlines() for state in (chapter - 1, chapter))
        lines += difflib.unified_diff(before, after, name, f"{name}, chapter {chapter:02}", n=2, lineterm="")
    return "\n".join(lines) or "nothing is new"


def generate(chapter: int, prompts: list[str], **options) -> list[list[int]]:
    """The output token ids of each sample, by the best that the engine has after this chapter."""
    engine = load(chapter)
    if chapter < 3:
        return lent.generate(engine, chapter, prompts, **options)
    if chapter < 8:
        rung = engine.generate_naive if chapter < 4 else engine.generate_cached
        sequences = rung(engine.Decoder(storyteller.PATH), prompts, **options)
    else:
        sequences = engine.Engine(storyteller.PATH).generate(prompts, **options)
    return [sequence.output_token_ids for sequence in sequences]


def run(chapter: int, prompts: list[str] = PROMPTS, llm: LLM | None = None, **options) -> None:
    """Continue the prompts by the engine after this chapter, and assert that its tokens are the package's."""
    options = {"max_tokens": 30, "temperature": 0.0, **options}
    llm = llm or lent.package()
    outputs = llm.generate(prompts, [SamplingParams(**options)] * len(prompts), use_tqdm=False)
    package = [sample.token_ids for output in outputs for sample in output.outputs]
    mine = generate(chapter, prompts, **options)
    for number, (own, other) in enumerate(zip(mine, package, strict=True)):
        assert own == other, f"sequence {number} is {own} after chapter {chapter}, and the package's is {other}"
    print(prompts[0] + llm.tokenizer.decode(mine[0]))
    print(f"after chapter {chapter:02}: {sum(map(len, mine))} tokens of {len(mine)} sequences, equal to the package's")


def main() -> None:
    parser = argparse.ArgumentParser(prog="my_engine", description="The engine as it is after a chapter of the course.")
    parser.add_argument("--chapter", type=int, default=LAST, choices=range(1, LAST + 1), metavar=f"1..{LAST}")
    parser.add_argument("--diff", action="store_true", help="print what the chapter adds")
    parser.add_argument("--show", choices=["all", *FILES], metavar="FILE", help="print a file of it, or all")
    chosen, total = parser.parse_args(), 0
    for name in FILES:
        lines = [written for line, written in state_lines(name, chosen.chapter) if line]
        total += len(lines)
        print(f"{name:14}{len(lines):4} lines, {lines.count(chosen.chapter):3} of them new")
    print(f"{'':14}{total:4} lines after chapter {chosen.chapter:02}")
    for name in FILES if chosen.show == "all" else [chosen.show] if chosen.show else ():
        print(f"\n{name}")
        show(name, chosen.chapter)
    if chosen.diff:
        print("\n" + diff(chosen.chapter))
    print()
    run(chosen.chapter)
