"""Checkers of the exercises, a file a chapter: ``from checks import ch01``, then ``ch01.keep_top_p(keep_top_p)``.

A checker takes the learner's answer, a function or a value. An exercise that is not attempted yet is no failure, a
right answer is reported as right, and a wrong one gets one sentence with what is wrong and for which input.
"""

from __future__ import annotations

import dis
import linecache
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Where the chapters compute (course.device): an answer may call what its chapter has built there.
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Wrong(Exception):
    """What is wrong with an answer. A notebook shows the sentence alone, without the checker's own code."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [f"Not right yet: {self}"]


class Checker:
    """One exercise's judge, made by ``@checker`` from a function that raises ``Wrong``, and known by its name."""

    def __init__(self, judge: Callable[[Any], None]) -> None:
        self.judge, self.name, self.__doc__ = judge, judge.__name__, judge.__doc__

    def __call__(self, answer: Any) -> None:
        """Judge ``answer`` and print the verdict; a wrong one raises ``Wrong``."""
        if not is_attempted(answer):
            print(f"{self.name}: not attempted yet")
            return
        try:
            self.judge(answer)
        except Wrong:
            raise
        except Exception as error:
            shown = without_checkers_frames(error)
            error._render_traceback_ = lambda: shown  # type: ignore[attr-defined]  # as for ``Wrong``
            raise
        print(f"{self.name}: right")


HERE = Path(__file__).parent
# Code that the learner has not written: the checkers, the package, Python's library and what is installed.
OTHERS = tuple(
    {str(HERE), str(HERE.parent / "drawing"), str(HERE.parent.parent / "paged_infer")}
    | {str(path) for path in HERE.parent.glob("*.py")}
    | {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def without_checkers_frames(error: BaseException) -> list[str]:
    """What a notebook shows of an exception of the answer: its message, and the lines of the answer that led there."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:  # an interpreter of kernels wraps what happens in them
        step = cause.__traceback__
        while step is not None:
            code, number = step.tb_frame.f_code, step.tb_lineno
            if not code.co_filename.startswith((*OTHERS, "<frozen")):
                source = linecache.getline(code.co_filename, number).strip()
                lines.append(f"  in {code.co_name}, line {number - code.co_firstlineno + 1}: {source}")
            step = step.tb_next
        error, cause = cause, cause.__cause__
    told = f"{type(error).__name__}: {error}".rstrip(": ")
    if not lines:
        return [f"The answer cannot be checked: {told}"]
    return [f"The answer raises {told}", *dict.fromkeys(lines)]


def checker(judge: Callable[[Any], None]) -> Checker:
    return Checker(judge)


def is_attempted(answer: Any) -> bool:
    """Whether there is more in it than ``...`` or None: a value, or code that does something but return these."""
    if isinstance(answer, type):
        return any(is_attempted(part) for part in vars(answer).values() if hasattr(part, "__code__"))
    if not hasattr(answer, "__code__"):
        return answer is not None and answer is not ...
    idle = ("RESUME", "NOP", "RETURN_VALUE", "LOAD_CONST", "RETURN_CONST")
    steps = list(dis.get_instructions(answer))
    values = [step.argval for step in steps if step.opname.endswith("_CONST")]
    return any(step.opname not in idle for step in steps) or any(v is not None and v is not ... for v in values)


def expect(good: bool, what_is_wrong: str) -> None:
    """Raise ``Wrong`` with the sentence unless ``good``."""
    if not good:
        raise Wrong(what_is_wrong)


def expect_tensor(found: Any, like: torch.Tensor, asked: str) -> None:
    """``found`` is a tensor of the shape and kind (bool, integer, float) of ``like``; ``asked`` names the call."""
    expect(found is not None, f"{asked} gives None: is the `return` missing?")
    expect(isinstance(found, torch.Tensor), f"{asked} gives a {type(found).__name__}, and a tensor is asked for")
    expect(found.shape == like.shape, f"{asked} has shape {tuple(found.shape)}, and {tuple(like.shape)} is asked for")
    kinds = [
        "bool" if t.dtype == torch.bool else "float" if t.is_floating_point() else "integer" for t in (found, like)
    ]
    expect(kinds[0] == kinds[1], f"{asked} holds {kinds[0]} values, and {kinds[1]} ones are asked for")
