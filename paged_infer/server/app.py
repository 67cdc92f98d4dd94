"""The application: an engine, its routes, and how errors look."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
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
ROUTERS = (  # a new route: a module with one more
    completions.router,
    chat.router,
    jobs.router,
    status.router,
    live_events.router,
    page.router,
)


def create_app(engine: AsyncLLM, settings: Settings | None = None) -> FastAPI:
    """An ASGI application that serves ``engine``, which stays its caller's: to shut it down is the caller's, too."""
    app = FastAPI(
        title="paged_infer",
        version=paged_infer.__version__,
        description=__doc__,
        lifespan=_lifespan,
        docs_url=None,  # these pages would fetch their scripts from elsewhere
        redoc_url=None,
    )
    service = Service(engine, settings or Settings())
    app.state.service = service
    app.state.jobs = jobs.Jobs(service)
    app.state.metrics = Metrics(engine, service.model_names[0])
    app.state.live_events = LiveEvents(service)
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
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


async def observe_loop_delay(observe: Callable[[float], None], every_s: float = LOOP_DELAY_EVERY_S) -> None:
    """Tell ``observe`` how many seconds late the event loop came to each of the moments ``every_s`` apart.

    A loop that stood still missed several of them, and each counts: so long whoever had come then would have waited.
    """
    clock = asyncio.get_running_loop().time
    due_s = clock() + every_s
    while True:
        await asyncio.sleep(due_s - clock())
        now_s = clock()
        while due_s <= now_s:
            observe(now_s - due_s)
            due_s += every_s
