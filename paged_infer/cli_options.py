"""What commands share: options, groups of options, and loading a model.

A parameter of a command that is a dataclass stands for a group of options, one for each field. The engine's options are
the fields of ``EngineConfig``, with its types, defaults and docstring, so that no command lists them.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

import typer

from paged_infer.config import EngineConfig, EngineOptions
from paged_infer.control.speculation import SpeculativeConfig
from paged_infer.execution.errors import EngineDeadError
from paged_infer.terminal import fail, show_error

if TYPE_CHECKING:
    from paged_infer.llm import LLM

RESULTS = Path("results")
"""Where commands write figures and numbers; git ignores it. Those that READMEs show are in figures/."""


class ModelName:
    """``Annotated[str | None, ModelName(help)]``: a parameter that can be given as an argument or as --model."""

    def __init__(self, help: str) -> None:
        self.help = help


_MODEL = "Local folder, GGUF file, hub id, smollm2, storyteller-moe or -steps; the bundled storyteller if left out."
Model = Annotated[str | None, ModelName(_MODEL)]
ModelOption = Annotated[str | None, typer.Option("--model", help=_MODEL)]
Figures = Annotated[Path, typer.Option(help="Folder for the figure and its numbers.")]
TextSeed = Annotated[int, typer.Option(help="The same seed gives the same sampled text; -1: another text each time.")]
BeginningsSeed = Annotated[int, typer.Option(help="Seed of the prompts: which beginnings of stories are used.")]


class Without:
    """``Annotated[EngineConfig, Without(name="reason")]``: fields of a group that are not options of a command."""

    def __init__(self, **reasons: str) -> None:
        self.reasons = reasons


Engine = Annotated[EngineConfig, Without(seed="the command's own --seed is the workload's")]
EngineOfText = Annotated[
    EngineConfig, Without(seed="the command's own --seed is the text's", trace="the record would end with the command")
]


def read_list(option: str, values: Iterable[str] | None) -> tuple[str, ...]:
    """The values of an option that may be repeated or be a JSON list, as in vLLM. Raises ValueError for a bad list."""
    found: list[str] = []
    for value in values or ():
        try:
            many = json.loads(value) if value.startswith("[") else [value]
        except json.JSONDecodeError as error:
            raise ValueError(f"{option} {value!r} is not valid JSON: {error}") from None
        if not all(isinstance(one, str) for one in many):
            raise ValueError(f"{option} {value!r}: must be a list of strings")
        found += many
    return tuple(found)


@functools.cache
def _type_hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


@dataclass(frozen=True, slots=True)
class _Group:
    """A dataclass among the parameters of a command, in place of its fields."""

    kind: type
    omitted: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, hint: Any, omitted: Mapping[str, str]) -> _Group | None:
        """The group of a type hint; None if that is not a dataclass. Omits what the enclosing group omits, too."""
        kind, *marks = (hint.__origin__, *hint.__metadata__) if typing.get_origin(hint) is Annotated else (hint,)
        if not (isinstance(kind, type) and is_dataclass(kind)):
            return None
        reasons = [mark.reasons for mark in marks if isinstance(mark, Without)]
        return cls(kind, functools.reduce(lambda before, more: {**before, **more}, reasons, omitted))

    def members(self) -> Iterator[tuple[Field[Any], Any]]:
        """Its fields that are not omitted, each with its type hint, or with its group if it is a dataclass."""
        hints = _type_hints(self.kind)
        for one in fields(self.kind):
            if one.init and one.name not in self.omitted:
                yield one, _Group.of(hints[one.name], self.omitted) or hints[one.name]

    def parameters(self) -> Iterator[inspect.Parameter]:
        for one, hint in self.members():
            if isinstance(hint, _Group):
                yield from hint.parameters()
            else:
                kind = _engine_option(one, hint) if self.kind is EngineConfig else hint
                yield from _parameters(one.name, kind, one.default)

    def take(self, options: dict[str, Any]) -> Any:
        """Make the dataclass from the options of its fields, which are removed. Raises its ValueErrors."""
        values = {}
        for one, hint in self.members():
            name, is_group = one.name, isinstance(hint, _Group)
            values[name] = hint.take(options) if is_group else _take(name, hint, one.default, options)
            if self.kind is EngineConfig and name in JSON_OPTIONS:
                values[name] = _read_json(name, values[name])
        return self.kind(**values)


def _model_name(hint: Any) -> ModelName | None:
    return next((mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, ModelName)), None)


def _parameters(name: str, hint: Any, default: Any) -> Iterator[inspect.Parameter]:
    """A command's parameter, or the argument and the option of a ``ModelName``."""
    given = {name: (hint, default)}
    if mark := _model_name(hint):
        argument = typer.Argument(help=mark.help, metavar=name.upper())
        option = typer.Option(f"--{name}", help="The same.")
        given = {
            f"{name}_argument": (Annotated[str | None, argument], None),
            name: (Annotated[str | None, option], None),
        }
    for one, (kind, value) in given.items():
        yield inspect.Parameter(one, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=kind)


def _take(name: str, hint: Any, default: Any, options: dict[str, Any]) -> Any:
    """The value of a parameter. Raises ValueError if two model names are given."""
    value = options.pop(name)
    if not _model_name(hint):
        return value
    word = options.pop(f"{name}_argument")
    if None not in (word, value) and word != value:
        raise ValueError(f"--{name} {value!r} and the argument {word!r}: give one of them")
    return next((one for one in (word, value) if one is not None), default)


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Make each dataclass among the parameters of a command a group of options, one for each field.

    >>> @with_option_groups
    ... def command(size: int, engine: EngineConfig) -> None: ...
    >>> list(inspect.signature(command).parameters)[:3]
    ['size', 'dtype', 'load_format']
    """
    hints = typing.get_type_hints(command, include_extras=True)
    parameters, groups, names = list[inspect.Parameter](), dict[str, _Group](), dict[str, Any]()
    for name, parameter in inspect.signature(command).parameters.items():
        group = _Group.of(hints[name], {})
        if group is not None:
            groups[name] = group
            parameters += group.parameters()
        else:
            parameters += _parameters(name, hints[name], parameter.default)
            if _model_name(hints[name]):
                names[name] = (hints[name], parameter.default)

    @functools.wraps(command)
    def flat(**options: Any) -> None:
        try:
            made = {name: group.take(options) for name, group in groups.items()}
            made |= {name: _take(name, hint, default, options) for name, (hint, default) in names.items()}
        except ValueError as error:
            fail(error)
        try:
            command(**options, **made)
        except EngineDeadError as error:
            show_error(error)
            raise typer.Exit(1) from None

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {one.name: one.annotation for one in parameters}
    del flat.__wrapped__
    return flat


JSON_OPTIONS = ("speculative_config",)


def _engine_option(one: Field[Any], hint: Any) -> Any:
    """The type and help of an option of ``EngineConfig``; a value of any other type is passed as text."""
    kinds = typing.get_args(hint) or (hint,)
    plain = [kind for kind in kinds if kind in (bool, int, float, str, type(None))]
    kind = functools.reduce(lambda left, right: left | right, plain if len(plain) == len(kinds) else {*plain, str})
    panel = "Engine switches" if bool in kinds else "Engine"  # apart: --flag and --no-flag need wide columns
    metavar = "" if bool in kinds else None
    return Annotated[kind, typer.Option(help=_engine_help().get(one.name), rich_help_panel=panel, metavar=metavar)]


@functools.cache
def _engine_help() -> dict[str, str]:
    """The options in the docstring of ``EngineConfig``, each with its text."""
    listed = (inspect.getdoc(EngineConfig) or "").partition("Args:\n")[2].partition("\n\n")[0]
    texts = dict(re.findall(r"^(\w+): (.*(?:\n .*)*)", textwrap.dedent(listed), flags=re.MULTILINE))
    return {name: _for_command_line(name, text) for name, text in texts.items()}


def _for_command_line(name: str, text: str) -> str:
    """
    >>> _for_command_line("a_flag", "launch ``x``. None: on\\n    a GPU. False: never.")
    'Launch x. Default: on a GPU. --no-a-flag: never.'
    """
    text = " ".join(text.replace("``", "").split())
    text = text.replace("None:", "Default:").replace("False:", f"--no-{name.replace('_', '-')}:")
    return text[:1].upper() + text[1:]


def _read_json(name: str, text: str | None) -> Any:
    """The value of an option that takes JSON. Raises ValueError if ``text`` is not valid."""
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name.replace('_', '-')} {text!r} is not valid JSON: {error}") from None


def as_arguments(config: EngineConfig) -> list[str]:
    """The options that ``config`` was read from.

    >>> as_arguments(EngineConfig(block_size=8, enable_prefix_caching=False))
    ['--block-size', '8', '--no-enable-prefix-caching']
    """
    words = []
    for name, value in config.options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, SpeculativeConfig):
            given = {key: one for key, one in asdict(value).items() if one is not None}
            words += [f"--{option}", json.dumps(given, default=str)]
        else:
            words += [f"--{option}", str(value)]
    return words


def open_llm(model: str | None, **options: Unpack[EngineOptions]) -> LLM:
    """Load a model for a command, without the progress bars and notices of the libraries."""
    from paged_infer.llm import LLM

    quiet_libraries()
    return LLM(model, **options)


def quiet_libraries() -> None:
    """Turn off the progress bars and notices of transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
