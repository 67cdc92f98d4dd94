"""``paged-infer serve``. The libraries of the extra ``[serve]`` are imported only when it is called."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
from typing import Annotated

import typer

from paged_infer.cli_options import Model, quiet_libraries, read_list, with_option_groups
from paged_infer.config import EngineConfig
from paged_infer.terminal import fail


@with_option_groups
def serve(
    engine: EngineConfig,
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="PAGED_INFER_API_KEY",
            help="Key required from clients. Set it in the environment to hide it from other users.",
        ),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            help="Allowed Host header: a name, *.domain or *; may be repeated. Default: loopback names and --host, or "
            "any host if the server listens on every address."
        ),
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose pages may call the server (CORS), or *; may be repeated or be a JSON list."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name that clients use for the model; may be repeated.")
    ] = None,
    max_num_waiting: Annotated[int, typer.Option(help="Most waiting sequences; further requests get a 429.")] = 1024,
    max_body_bytes: Annotated[int, typer.Option(help="Largest request body; a larger one gets a 413.")] = 1 << 20,
    max_n: Annotated[int, typer.Option(help="Most samples or beams per prompt; more get a 400.", min=1)] = 128,
    max_num_logprobs: Annotated[int, typer.Option(help="Most logprobs that one request could get; more get a 400.")] = 1
    << 22,
    receive_timeout: Annotated[
        float, typer.Option(help="Seconds that a request's head, and then its body, may take to arrive.")
    ] = 30.0,
    step_timeout: Annotated[
        float, typer.Option(help="Seconds that one step may take before the engine is abandoned; 0: no limit.")
    ] = 600.0,
    engine_process: Annotated[
        bool, typer.Option("--engine-process", help="Run the engine in a process of its own.")
    ] = False,
    disaggregated_prefill: Annotated[
        bool, typer.Option("--disaggregated-prefill", help="Compute prompts in one process, and answers in another.")
    ] = False,
    data_parallel_size: Annotated[
        int, typer.Option(help="Engines that serve the requests, each in a process of its own if several.", min=1)
    ] = 1,
    data_parallel_backend: Annotated[
        str, typer.Option(help="Where those are: mp, on this machine, or ray, on the nodes of a Ray cluster.")
    ] = "mp",
    data_parallel_routing: Annotated[
        str | None,
        typer.Option(help="How requests are divided among them: round_robin, prefix, or least_loaded, the default."),
    ] = None,
    enable_auto_tool_choice: Annotated[
        bool,
        typer.Option("--enable-auto-tool-choice", help="Look for tool calls in answers; needs --tool-call-parser."),
    ] = False,
    tool_call_parser: Annotated[
        str | None, typer.Option(help="How the model writes tool calls: hermes (also Qwen's way) or llama3_json.")
    ] = None,
    result_ttl: Annotated[float, typer.Option(help="Seconds that /result/{id} keeps an answer.")] = 300.0,
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds that running requests may continue after SIGTERM or Ctrl-C.", min=0)
    ] = 30.0,
    log_level: Annotated[
        str, typer.Option(help="uvicorn's log level: critical, error, warning, info, debug.")
    ] = "info",
) -> None:
    """Serve a model over HTTP: OpenAI's /v1/completions and /v1/chat/completions, /generate, /health and /metrics."""
    try:
        from paged_infer.server import hosts, run, service
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "starlette", "pydantic"):
            raise
        fail(ValueError(f"serve needs {error.name}: pip install 'paged-infer[serve]'"))
    from paged_infer.async_llm import AsyncLLM

    quiet_libraries()
    try:
        if log_level not in ("critical", "error", "warning", "info", "debug"):
            raise ValueError(f"log_level={log_level!r}: must be critical, error, warning, info or debug")
        if not 0 <= step_timeout < math.inf:
            raise ValueError(f"step_timeout={step_timeout}: must be a finite number of seconds, or 0 for no limit")
        if enable_auto_tool_choice and tool_call_parser is None:
            raise ValueError("enable_auto_tool_choice=True: needs tool_call_parser")
        if tool_call_parser is not None and not enable_auto_tool_choice:
            raise ValueError(f"tool_call_parser={tool_call_parser!r}: needs enable_auto_tool_choice")
        settings = service.Settings(
            api_key=api_key,
            allowed_hosts=tuple(allowed_hosts or ("*",)),
            allowed_origins=read_list("--allowed-origins", allowed_origins),
            served_model_names=tuple(served_model_name or ()),
            max_body_bytes=max_body_bytes,
            receive_timeout_s=receive_timeout,
            max_n=max_n,
            max_num_logprobs=max_num_logprobs,
            result_ttl_s=result_ttl,
            tool_call_parser=tool_call_parser,
        )
        listener = run.listen(host, port)
        if not allowed_hosts:
            settings = dataclasses.replace(settings, allowed_hosts=hosts.names_of(host, listener.getsockname()[0]))
        llm = AsyncLLM(
            model,
            max_num_waiting=max_num_waiting,
            step_timeout=step_timeout or None,
            engine_process=engine_process,
            disaggregated_prefill=disaggregated_prefill,
            data_parallel_size=data_parallel_size,
            data_parallel_backend=data_parallel_backend,
            data_parallel_routing=data_parallel_routing,
            **engine.options,
        )
    except ValueError as error:
        fail(error)
    is_clean = run.serve(llm, settings, listener, shutdown_timeout_s=shutdown_timeout, log_level=log_level)
    if llm.is_abandoned:  # its thread may never return, and the interpreter's exit could block on it
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    if not is_clean:
        raise typer.Exit(1)
