"""``paged-infer generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from paged_infer.cli_options import EngineOfText, ModelOption, TextSeed, open_llm, with_option_groups
from paged_infer.model.loading.hub import names_a_model
from paged_infer.params import SamplingParams
from paged_infer.terminal import Writer, fail, failure_of, show_error, show_stream


@with_option_groups
def generate(
    prompts: Annotated[
        list[str], typer.Argument(help="Texts to continue. The first of several is the model if it is the name of one.")
    ],
    engine: EngineOfText,
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate for each prompt.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most probable tokens up to this probability.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End the text before this string; may be repeated.")] = None,
    seed: TextSeed = 0,
) -> None:
    """Continue each prompt. A single one is printed as it grows.

    Exits with status 1 if one of them failed; the reason is printed on standard error.
    """
    if model is None and len(prompts) > 1 and names_a_model(prompts[0]):
        model, *prompts = prompts
    try:
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=stop or (), seed=seed
        )
        llm = open_llm(model, **engine.options)
        if len(prompts) == 1:
            growing, writer = llm.stream(prompts[0], params), Writer()
            writer.write(prompts[0])
            output = show_stream(growing, writer)
            outputs = [output] if output else []
        else:
            outputs = llm.generate(prompts, params)
            for output in outputs:
                typer.echo(f"{output.prompt}{output.outputs[0].text}\n")
    except ValueError as error:
        fail(error)
    failures = {index: reason for index, output in enumerate(outputs) if (reason := failure_of(output))}
    for index, reason in failures.items():
        show_error(f"prompt {index}: {reason}")
    if failures:
        raise typer.Exit(1)
