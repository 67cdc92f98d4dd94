"""What the commands share: their options, how a model is opened, how an error and a stream are shown."""

from __future__ import annotations

import functools
import inspect
import json
import typing
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from paged_infer.llm import LLM
    from paged_infer.outputs import RequestOutput


def __getattr__(name: str) -> Console:
    """``console``, made when first asked for: what a machine that only measures imports needs no rich."""
    if name != "console":
        raise AttributeError(name)
    from rich.console import Console

    globals()[name] = Console()
    return globals()[name]


Model = Annotated[str | None, typer.Argument(help="Local folder or hub id; the bundled storyteller if left out.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="Local folder or hub id; default: the storyteller.")]
LoadFormat = Annotated[str, typer.Option(help="auto reads the weights; dummy makes random ones of the model's shape.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Backend = Annotated[
    str,
    typer.Option(
        "--attention-backend",
        help="How the paged cache is read: auto, triton, c, sdpa, torch, or your module:function.",
    ),
]
BlockSize = Annotated[int, typer.Option(help="Tokens in a block of the paged cache.")]
NumBlocks = Annotated[int | None, typer.Option(help="Blocks in the pool; default: what `info` shows.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest sequence, prompt and output together.")]
Speculation = Annotated[
    str | None,
    typer.Option(
        "--speculative-config",
        help='JSON: {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2} '
        'or {"method": "draft_model", "model": FOLDER, "num_speculative_tokens": 4}.',
    ),
]
Figures = Annotated[Path, typer.Option(help="Folder for the picture and its numbers.")]
Seed = Annotated[int, typer.Option(help="Seed of the workload or the sampled text; for a text, -1 is none.")]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a command opens its engine."""

    dtype: Dtype = "auto"
    device: Device = "auto"
    attention_backend: Backend = "auto"
    block_size: BlockSize = 16
    num_blocks: NumBlocks = None
    max_model_len: MaxModelLen = None
    speculative_config: Speculation = None

    def open(self, model: str | None) -> LLM:
        options = asdict(self) | {"speculative_config": read_speculation(self.speculative_config)}
        return open_llm(model, **options)


def read_speculation(text: str | None) -> Any:
    """``--speculative-config`` as ``EngineConfig`` takes it. Raises ValueError for what is no JSON."""
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--speculative-config {text!r} is no JSON: {error}") from None


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


def with_blocks(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters that are dataclasses stand for their fields, each an option of its own.

    >>> @with_blocks
    ... def command(size: int, engine: EngineOptions) -> None: ...
    >>> list(inspect.signature(command).parameters)[:3]
    ['size', 'dtype', 'device']
    """
    hints = typing.get_type_hints(command, include_extras=True)
    parameters, blocks = [], dict[str, type]()
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints[name]
        if is_dataclass(hint) and isinstance(hint, type):
            blocks[name] = hint
            kinds = typing.get_type_hints(hint, include_extras=True)
            parameters += [
                inspect.Parameter(
                    one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=kinds[one.name]
                )
                for one in fields(hint)
            ]
        else:
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def flat(**options: Any) -> None:
        made = {
            name: block(**{one.name: options.pop(one.name) for one in fields(block)}) for name, block in blocks.items()
        }
        command(**options, **made)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {one.name: one.annotation for one in parameters}
    del flat.__wrapped__
    return flat


def open_llm(model: str | None, **options: Any) -> LLM:
    """Load a model for a command, without the progress bars and notices of the libraries below."""
    from paged_infer.llm import LLM

    quiet_libraries()
    return LLM(model, **options)


def quiet_libraries() -> None:
    """No progress bars and no notices while a model is loaded."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def fail(error: ValueError) -> NoReturn:
    """One line on standard error, and exit status 2."""
    show_error(error)
    raise typer.Exit(2)


def show_error(error: Exception | str) -> None:
    """One line on standard error."""
    typer.echo(f"error: {error}", err=True)


def failure_of(output: RequestOutput) -> str | None:
    """Why the request could not go on, if it could not."""
    return next((one.error for one in output.outputs if one.finish_reason == "error"), None)


def show_stream(outputs: Iterable[RequestOutput], keep_space: bool = True) -> RequestOutput:
    """Print a continuation as it grows; returns its end. An answer is shown without its leading space."""
    shown = ""
    for output in outputs:
        text = output.outputs[0].text
        piece = text[len(shown) :]
        typer.echo(piece if shown or keep_space else piece.lstrip(), nl=False)
        shown = text
    typer.echo()
    return output
