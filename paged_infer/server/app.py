"""The application: an engine, its routes, and how errors look."""

from __future__ import annotations

from fastapi import FastAPI

import paged_infer
from paged_infer.async_engine import AsyncLLM
from paged_infer.server import chat, completions, errors, jobs, status
from paged_infer.server.door import Door
from paged_infer.server.metrics import Metrics
from paged_infer.server.service import Service, Settings

ROUTERS = (completions.router, chat.router, jobs.router, status.router)  # a new route: a module with one more


def create_app(engine: AsyncLLM, settings: Settings | None = None) -> FastAPI:
    """An ASGI application that serves ``engine``, which stays its caller's: to shut it down is the caller's, too."""
    app = FastAPI(
        title="paged_infer",
        version=paged_infer.__version__,
        description=__doc__,
        docs_url=None,  # these pages would fetch their scripts from elsewhere
        redoc_url=None,
    )
    service = Service(engine, settings or Settings())
    app.state.service = service
    app.state.jobs = jobs.Jobs(service)
    app.state.metrics = Metrics(engine, service.model_names[0])
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(Door, service=service)
    return app
