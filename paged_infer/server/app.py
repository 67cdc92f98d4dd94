"""The ASGI application: an engine, the routes, the middleware and the form of errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import paged_infer
from paged_infer.async_llm import AsyncLLM
from paged_infer.server.metrics import Metrics
from paged_infer.server.middleware import ChecksMiddleware
from paged_infer.server.openai import errors
from paged_infer.server.routes import chat, completions, jobs, live_events, page, status
from paged_infer.server.routes.live_events import LiveEvents
from paged_infer.server.service import Service, Settings

LOOP_DELAY_EVERY_S = 0.02
ROUTES = (completions, chat, jobs, status, live_events, page)  # modules, each with a ``router``


def create_app(engine: AsyncLLM, settings: Settings | None = None) -> FastAPI:
    """An ASGI application that serves ``engine``. The caller owns the engine, and shuts it down."""
    app = FastAPI(
        title="paged_infer",
        version=paged_infer.__version__,
        description="OpenAI's HTTP API over one engine, jobs, and the engine's state.",
        lifespan=_lifespan,
        docs_url=None,  # these pages would load scripts from other hosts
        redoc_url=None,
    )
    service = Service(engine, settings or Settings())
    app.state.service = service
    app.state.jobs = jobs.Jobs(service)
    app.state.metrics = Metrics(engine, service.model_names[0], engine.cache_config)
    app.state.live_events = [LiveEvents(service, i) for i, _ in enumerate(engine.replica_stats())]
    errors.install(app, [route for module in ROUTES for route in module.router.routes])
    for module in ROUTES:
        app.include_router(module.router)
    app.add_middleware(ChecksMiddleware, service=service)
    if service.settings.allowed_origins:  # outermost: a preflight request carries no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Location", "Retry-After"],
        )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    task = asyncio.create_task(observe_loop_delay(app.state.metrics.loop_delay.observe))
    try:
        yield
    finally:
        task.cancel()
        app.state.service.answering.shutdown(wait=False)


async def observe_loop_delay(
    observe: Callable[[float], None],
    every_s: float = LOOP_DELAY_EVERY_S,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> None:
    """Call ``observe`` every ``every_s`` seconds with the delay of the event loop, in seconds.

    A blocked loop misses several of these times, and each is observed: a request that arrived at one would have waited
    as long.
    """
    due_s = clock() + every_s
    while True:
        await sleep(due_s - clock())
        now_s = clock()
        while due_s <= now_s:
            observe(now_s - due_s)
            due_s += every_s
