"""/health, /metrics and /v1/models: the state of the server, and what it serves."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from paged_infer.server.openai.errors import APIError, documented, json_response
from paged_infer.server.service import Service, closing_error, service_of

router = APIRouter()
TEXT = {200: {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.get("/health", responses=documented(503))
async def health(request: Request) -> Response:
    """200 while requests are served; 503 if the engine has failed or the server is shutting down.

    Several replicas are listed: the number of each, `ready`, `starting` or `dead`, and how often it was replaced.
    """
    service = service_of(request)
    if service.is_closing:
        raise closing_error()
    if service.engine.error is not None:
        raise APIError(503, str(service.engine.error), code="engine_dead")
    replicas = service.engine.health()
    return json_response({"status": "ok", **({"replicas": replicas} if replicas else {})})


@router.get("/metrics", responses=TEXT)  # type: ignore[arg-type]
async def metrics(request: Request) -> Response:
    """Prometheus metrics under vLLM's names."""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models", responses=documented(401))
async def models(request: Request) -> Response:
    """The names of the served model."""
    service = service_of(request)
    return json_response({"object": "list", "data": [_card(service, name) for name in service.model_names]})


@router.get("/v1/models/{model:path}", responses=documented(401, 404, 422))
async def model(model: str, request: Request) -> Response:
    service = service_of(request)
    return json_response(_card(service, service.check_model(model)))


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "paged_infer",
        "root": service.engine.name,
        "max_model_len": service.engine.max_model_len,
    }
