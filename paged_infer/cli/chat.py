"""``paged-infer chat``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from paged_infer.cli_options import EngineOfText, Model, TextSeed, open_llm, with_option_groups
from paged_infer.params import SamplingParams
from paged_infer.terminal import Writer, fail, failure_of, show_error, show_stream

if TYPE_CHECKING:
    from paged_infer.llm import LLM


HELP = """/new    start a new conversation
/help   show these commands
/quit   end the chat, as Ctrl-D does
Ctrl-C  stop an answer; the text so far is kept"""


@with_option_groups
def chat(
    engine: EngineOfText,
    model: Model = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens in an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: TextSeed = 0,
) -> None:
    """Chat with a model that has a chat template. The storyteller tells stories, and answers questions about them.

    /help shows the commands; Ctrl-C stops an answer, /quit or Ctrl-D ends the chat.
    """
    try:
        llm = open_llm(model, **engine.options)
        stop = ["\nQ:"] if llm.is_storyteller else []  # otherwise it continues with the next question
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop)
        llm.chat_prompt([{"role": "user", "content": "hello"}])  # raises now if there is no template
    except ValueError as error:
        fail(error)
    if llm.is_storyteller:
        typer.echo("Try: Tell me a story about Mia and a red key. Then: Where is the key? (/help)")
    messages: list[dict[str, str]] = []
    for line in _lines():
        if line == "/quit":
            return
        if line == "/new":
            messages = []
        elif line == "/help":
            typer.echo(HELP)
        elif re.fullmatch(r"/\w+", line):
            show_error(f"{line} is not a command; /help lists them")
        else:
            messages += _answer(llm, [*messages, {"role": "user", "content": line}], params)


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> list[dict[str, str]]:
    """Print the answer. Returns the messages to add: question and answer, or none if the request failed."""
    output = None
    try:
        growing = llm.stream(llm.chat_prompt(messages), params)
        output = show_stream(growing, Writer(), keep_space=False, interruptible=True)
        del growing  # which aborts it, if Ctrl-C has ended it
        reason = failure_of(output) if output else None
    except ValueError as error:  # too long, for example
        reason = str(error)
    if reason is not None:
        show_error(reason)
    if reason is not None or output is None:
        return []
    return [messages[-1], {"role": "assistant", "content": output.outputs[0].text}]


def _lines() -> Iterator[str]:
    """The lines that the user types until the end of input, without empty ones."""
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except KeyboardInterrupt:
            if not is_terminal:
                return
            typer.echo("\n/quit or Ctrl-D ends the chat")
            continue
        except EOFError:
            if is_terminal:
                typer.echo()
            return
        if line:
            yield line
