"""/generate and /result/{id}: submit a prompt now, fetch its answer later."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from paged_infer.async_llm import RequestStream
from paged_infer.outputs import RequestOutput
from paged_infer.server.openai.errors import APIError, documented, json_response
from paged_infer.server.openai.json_stream import usage
from paged_infer.server.openai.protocol import GenerateRequest
from paged_infer.server.service import Service, new_id, service_of

router = APIRouter()


class JobBody(BaseModel):
    """The response of the jobs' routes, for the OpenAPI document."""

    id: str
    status: Literal["running", "finished", "failed", "aborted"]
    outputs: list[dict[str, Any]] = []
    usage: dict[str, Any] = {}
    error: dict[str, Any] = {}


JOB: dict[str, Any] = {"description": "The job.", "model": JobBody}


@dataclass(slots=True, eq=False)
class _Job:
    id: str
    stream: RequestStream
    task: asyncio.Task[None] | None = None
    ended_s: float | None = None  # time.monotonic()
    output: RequestOutput | None = None
    error: APIError | None = None

    @property
    def status(self) -> str:
        if self.error is not None:
            return "aborted" if self.error.code == "aborted" else "failed"
        return "running" if self.output is None else "finished"

    def describe(self) -> dict[str, Any]:
        if self.error is not None:
            return {"id": self.id, "status": self.status, **self.error.body()}
        if self.output is None:
            return {"id": self.id, "status": self.status}
        outputs = [
            {"index": one.index, "text": one.text, "token_ids": one.token_ids, "finish_reason": one.finish_reason}
            for one in self.output.outputs
        ]
        return {"id": self.id, "status": self.status, "outputs": outputs, "usage": usage([self.output])}


class Jobs:
    """Running jobs, and finished ones until they expire; at ``app.state.jobs``."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._jobs: OrderedDict[str, _Job] = OrderedDict()  # in order of arrival
        self._ended: OrderedDict[str, _Job] = OrderedDict()  # in order of their end

    async def begin(self, body: GenerateRequest) -> _Job:
        self._forget()
        service, (job_id, label) = self._service, new_id("gen")
        salt, priority = body.cache_salt, body.priority
        try:
            (stream,) = await service.open(
                [body.prompt], body.params(), label, stream=False, cache_salt=salt, priority=priority
            )
        except APIError as error:
            raise body.in_own_terms(error) from None
        job = self._jobs[job_id] = _Job(job_id, stream)
        job.task = asyncio.create_task(self._finish(job))
        return job

    async def _finish(self, job: _Job) -> None:
        try:
            (job.output,) = await self._service.final_outputs([job.stream])
        except Exception as error:
            known = self._service.to_api_error(error)
            job.error = known if isinstance(known, APIError) else APIError(500, f"{type(error).__name__}: {error}")
        finally:
            job.stream.close()
            if job.id in self._jobs:  # not dropped meanwhile
                job.ended_s = time.monotonic()
                self._ended[job.id] = job
                asyncio.get_running_loop().call_later(self._service.settings.result_ttl_s, self._forget)

    def find(self, job_id: str) -> _Job:
        self._forget()
        job = self._jobs.get(job_id)
        if job is None:
            ttl = self._service.settings.result_ttl_s
            raise APIError(404, f"there is no result {job_id!r}: results are kept for {ttl:g} s", param="id")
        return job

    def drop(self, job_id: str) -> _Job:
        """Forget the job; abort it if it is still running."""
        job = self.find(job_id)
        if job.task is not None:
            job.task.cancel()
        job.stream.close()
        del self._jobs[job_id]
        self._ended.pop(job_id, None)
        return job

    def _forget(self) -> None:
        """Drop expired results, and the oldest ones beyond ``max_num_results``."""
        now, settings = time.monotonic(), self._service.settings
        while self._ended:
            job = next(iter(self._ended.values()))
            assert job.ended_s is not None
            if now - job.ended_s < settings.result_ttl_s and len(self._ended) <= settings.max_num_results:
                break
            del self._ended[job.id]
            self._jobs.pop(job.id, None)


def _jobs_of(request: Request) -> Jobs:
    return request.app.state.jobs


@router.post(
    "/generate", status_code=202, responses={202: JOB, **documented(400, 401, 404, 408, 413, 422, 429, 500, 503)}
)
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Queue a prompt, and return immediately the id under which `/result/{id}` returns the answer."""
    service_of(request).check_model(body.model)
    job = await _jobs_of(request).begin(body)
    return json_response(job.describe(), 202, {"Location": f"/result/{job.id}"})


@router.get("/result/{id}", responses={200: JOB, **documented(401, 404, 422)})
async def result(id: str, request: Request) -> Response:
    """The job's status, and its answer once it has finished. It can be fetched again until it expires."""
    return json_response(_jobs_of(request).find(id).describe())


@router.delete("/result/{id}", responses={200: JOB, **documented(401, 404, 422)})
async def abort(id: str, request: Request) -> Response:
    """Forget the job; abort it if it is still running."""
    job = _jobs_of(request).drop(id)
    return json_response({"id": job.id, "status": "aborted" if job.status == "running" else job.status})
