"""Output of commands: errors in one line, texts as they grow, and how a command ends when it can print no more."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from paged_infer.outputs import RequestOutput

    console: Console

# Where a line may be broken: before spaces, and after a Chinese, Japanese or Korean character.
_BREAK = re.compile(r"(?<=\S)(?=\s)|(?<=[\u3000-\u9fff\uac00-\ud7af\uff00-\uffef])")


def __getattr__(name: str) -> Any:
    """``console``, created on first use: a machine that only runs benchmarks may not have rich."""
    if name != "console":
        raise AttributeError(name)
    from rich.console import Console

    globals()[name] = Console()
    return globals()[name]


def replace_what_cannot_be_coded() -> None:
    """Print characters that the terminal's encoding lacks as "?", and read bytes that it cannot decode as U+FFFD."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises SystemExit, as Ctrl-C raises KeyboardInterrupt: temporary files are removed, and
    processes ended. By default a signal ends Python where it is, and no ``with`` or ``finally`` gets to its end.

    The status is the one that shells show for SIGTERM. A handler that is already set stays.
    """

    def end(*_: object) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_command(command: Callable[..., Any]) -> None:
    """``typer.run``, for scripts: run a function as the command, within ``ended_by_sigterm``."""
    with ended_by_sigterm():
        typer.run(command)


class CommandLine(typer.Typer):
    """A command line that exits with status 1 if its output cannot be written: silently if a pipe was closed
    (``| head``), and otherwise, for example on a full disk, with one line on standard error. SIGTERM ends it as
    ``ended_by_sigterm`` says."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            try:
                with ended_by_sigterm():
                    return super().__call__(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except OSError as error:
            try:
                sys.stdout.flush()
            except OSError:  # what is left would fail again at the interpreter's exit, with a traceback
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):
                show_error(error)
            raise SystemExit(1) from None


def fail(error: ValueError) -> NoReturn:
    """Print one line on standard error, and exit with status 2."""
    show_error(error)
    raise typer.Exit(2)


def show_error(error: Exception | str) -> None:
    """Print one line on standard error."""
    typer.echo(f"error: {error}", err=True)


def failure_of(output: RequestOutput) -> str | None:
    """Why the request failed; None if it did not."""
    return next((one.error for one in output.outputs if one.finish_reason == "error"), None)


class Writer:
    """Prints a text as it grows. On a terminal, lines break between words, so a word is printed when it is complete.

    ``width``: columns, or 0 for lines of any length. Default: the terminal's, or 0 in a file or pipe.
    """

    def __init__(self, width: int | None = None) -> None:
        is_terminal = sys.stdout.isatty()
        self.width = (shutil.get_terminal_size().columns if is_terminal else 0) if width is None else width
        self.column, self.word = 0, ""

    def write(self, text: str) -> None:
        if not self.width:
            typer.echo(text, nl=False)
            return
        *words, self.word = _BREAK.split(self.word + text)
        for word in words:
            self._put(word)

    def _put(self, word: str) -> None:
        """Print a word and the space before it, or, if it does not fit, a new line instead of the space."""
        from rich.cells import cell_len

        lines, is_broken, word = word.rpartition("\n")
        if is_broken:
            typer.echo(lines)
            self.column = 0
        if self.column and self.column + cell_len(word) > self.width:
            typer.echo()
            self.column, word = 0, word.lstrip()
        typer.echo(word, nl=False)
        self.column += cell_len(word)
        if self.column > self.width:  # the terminal has broken it
            self.column %= self.width

    def end(self) -> None:
        """Print what has been held back, and end the line."""
        if self.word:
            self._put(self.word)
        typer.echo()
        self.column, self.word = 0, ""


def show_stream(
    outputs: Iterable[RequestOutput], writer: Writer, keep_space: bool = True, interruptible: bool = False
) -> RequestOutput | None:
    """Print a continuation as it grows; returns the last output, or None if there was none.

    Args:
        keep_space: False drops the continuation's leading space.
        interruptible: Ctrl-C ends the output without raising.
    """
    shown, output = "", None
    try:
        for output in outputs:
            text = output.outputs[0].text
            piece = text[len(shown) :]
            writer.write(piece if shown or keep_space else piece.lstrip())
            shown = text
    except KeyboardInterrupt:
        if not interruptible:
            raise
    finally:
        writer.end()
    return output
