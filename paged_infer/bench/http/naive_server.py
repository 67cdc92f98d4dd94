"""What ``bench serve`` measures beside the server: a rung that serves one request at a time, behind the same HTTP.

    clients  --->  FastAPI  --->  a queue of one  --->  generate_cached or generate_naive, in a thread

It is the server that one writes first: it listens while it computes, and everybody waits for everybody before them.
Whoever leaves is computed all the same, and it does not stream.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
import uvicorn
from fastapi import FastAPI
from starlette.responses import Response

from paged_infer import baselines
from paged_infer.bench.options import NAIVE_BASELINES
from paged_infer.cli_options import Engine, Model, fail, open_llm, with_option_groups
from paged_infer.llm import LLM
from paged_infer.params import SamplingParams
from paged_infer.server.openai import errors
from paged_infer.server.openai.json_stream import usage
from paged_infer.server.openai.protocol import CompletionRequest, bad_value
from paged_infer.server.run import listen

GENERATE = {"naive": baselines.generate_naive, "cached": baselines.generate_cached}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@with_option_groups
def serve(
    engine: Engine,
    model: Model = None,
    rung: Annotated[str, typer.Option(help=f"{' or '.join(NAIVE_BASELINES)}.")] = "cached",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
) -> None:
    """Serve /v1/completions with a rung of the ladder, one request at a time."""
    try:
        if rung not in NAIVE_BASELINES:
            raise ValueError(f"rung={rung!r}: must be {' or '.join(NAIVE_BASELINES)}")
        door = listen(host, port)
        application = create_app(open_llm(model, **engine.options), rung)
    except ValueError as error:
        fail(error)
    uvicorn.Server(uvicorn.Config(application, log_level="warning")).run([door])


def create_app(llm: LLM, rung: str) -> FastAPI:
    """The application, on the weights of ``llm``."""
    served = FastAPI(title=f"the {rung} rung", docs_url=None, redoc_url=None)
    errors.install(served)
    turn = asyncio.Lock()

    @served.get("/health")
    async def health() -> Response:
        return errors.json_response({"status": "ok"})

    @served.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Response:
        for name in ("stream", "use_beam_search", "echo", "logprobs"):
            if (asked := getattr(body, name)) is not None and asked is not False:
                raise errors.APIError(400, f"{name} is not supported: whole answers, and no more", param=name)
        if body.model not in (None, llm.name):
            raise errors.APIError(404, f"model={body.model!r} is not served; served: {llm.name}", param="model")
        params = body.params()
        assert isinstance(params, SamplingParams)
        async with turn:
            try:
                outputs = await asyncio.to_thread(GENERATE[rung], llm, body.prompts(), params)
            except ValueError as error:
                raise bad_value(error) from None
        answers = [one for output in outputs for one in output.outputs]
        choices = [
            {"index": index, "text": one.text, "logprobs": None, "finish_reason": one.finish_reason}
            for index, one in enumerate(answers)
        ]
        return errors.json_response(
            {"object": "text_completion", "model": llm.name, "choices": choices, "usage": usage(outputs)}
        )

    return served


if __name__ == "__main__":
    app()
