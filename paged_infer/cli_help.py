"""Help as plain text, with whole option names at 80 columns, where rich's panels would cut them off."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from typer.core import TyperCommand, TyperGroup

from paged_infer.suggestions import hint

INDENT = "  "
NAME_COLUMNS = 26  # width of the first column; a longer name has a line of its own


class Command(TyperCommand):
    """A command whose options are listed under the titles of their ``rich_help_panel``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with option_hints(self, ctx):
            return super().parse_args(ctx, args)

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        write_text(formatter, self.help)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                title = getattr(parameter, "rich_help_panel", None) or usual
                panels.setdefault(title, []).append(record)
        for title, records in panels.items():
            if records:
                write_list(formatter, title, records)


class Group(TyperGroup):
    """Lists the commands in ``order``, then the others, each with the whole first paragraph of its help."""

    order: tuple[str, ...] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with option_hints(self, ctx):
            return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        names = list(self.commands)
        return sorted(names, key=lambda name: self.order.index(name) if name in self.order else len(self.order))

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        write_text(formatter, self.help)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        helps = {name: self.commands[name].help or "" for name in self.list_commands(ctx)}
        write_list(
            formatter, "Commands", [(name, inspect.cleandoc(text).split("\n\n")[0]) for name, text in helps.items()]
        )


@contextmanager
def option_hints(command: Any, ctx: Any) -> Iterator[None]:
    """The error for an unknown option names the one that may be meant, or the commands that it belongs to."""
    try:
        yield
    except Exception as error:  # of click, or of the copy of it that newer versions of typer have
        option = getattr(error, "option_name", None) or ""
        if not hasattr(error, "possibilities") or not option.startswith("--"):
            raise
        root = ctx.find_root()
        places = {path: option_names(one) for path, one in commands_below(root.command, ctx, root.info_name)}
        found = hint(_plain(option), option_names(command), places, spell=lambda name: f"--{name.replace('_', '-')}")
        error.message, error.possibilities = f"{error}{found}", None  # type: ignore[attr-defined]
        raise


def option_names(command: Any) -> list[str]:
    """A command's long options as parameters: "max_tokens" for --max-tokens."""
    names = [name for one in command.params for name in (*one.opts, *one.secondary_opts)]
    return [_plain(name) for name in names if name.startswith("--")]


def commands_below(command: Any, ctx: Any, path: str) -> Iterator[tuple[str, Any]]:
    """A command and those of its group, each with the words that call it."""
    yield path, command
    for word in command.list_commands(ctx) if hasattr(command, "commands") else ():
        yield from commands_below(command.commands[word], ctx, f"{path} {word}")


def _plain(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def in_order(*names: str) -> type[Group]:
    """A ``Group`` with this order."""
    return type("Group", (Group,), {"order": names})


def write_text(formatter: Any, text: str | None) -> None:
    """Write paragraphs, indented. Unlike click's own functions, these never break a line within a --long-option."""
    for paragraph in inspect.cleandoc(text or "").split("\n\n"):
        formatter.write("\n" + _filled(paragraph, formatter.width, INDENT) + "\n")


def write_list(formatter: Any, title: str, records: Sequence[tuple[str, str]]) -> None:
    """Write a title, and under it each name with its text in a second column."""
    formatter.write(f"\n{title}:\n")
    column = min(max((len(name) for name, _ in records), default=0), NAME_COLUMNS) + 2 * len(INDENT)
    for name, text in records:
        text = _filled(text, formatter.width, " " * column)
        name = f"{INDENT}{name}"
        formatter.write(f"{name.ljust(column)}{text[column:]}\n" if len(name) < column - 1 else f"{name}\n{text}\n")


def _filled(text: str, width: int, indent: str) -> str:
    return textwrap.fill(
        " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


PLAIN: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None, "pretty_exceptions_enable": False}
"""Arguments of every ``typer.Typer`` of the command line."""
