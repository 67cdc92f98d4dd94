"""/generate and /result: submit now, fetch later; results expire."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from holding import until
from serving import Served, poll, serving

from paged_infer import SamplingParams
from paged_infer.server.routes import jobs
from paged_infer.server.routes.jobs import Jobs
from paged_infer.server.service import Settings

LONG = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True}


def test_a_job_is_answered_at_once_and_its_result_waits(served, storyteller) -> None:
    params = {"max_tokens": 12, "n": 2, "seed": 4}
    submitted = served.post("/generate", prompt="Once upon a time", **params)
    assert submitted.status_code == 202
    job = submitted.json()
    assert job["status"] == "running" and submitted.headers["location"] == f"/result/{job['id']}"
    result = poll(served, job["id"])
    reference = storyteller.generate("Once upon a time", SamplingParams(**params), use_tqdm=False)[0]
    assert [(o["text"], o["token_ids"], o["finish_reason"]) for o in result["outputs"]] == [
        (one.text, one.token_ids, one.finish_reason) for one in reference.outputs
    ]
    assert result["usage"]["completion_tokens"] == sum(len(one.token_ids) for one in reference.outputs)
    assert served.http.get(f"/result/{job['id']}").json() == result  # and can be asked for again


def test_bad_input_is_told_when_it_is_submitted(served) -> None:
    assert served.post("/generate", prompt="").status_code == 400
    assert served.post("/generate", prompt="x", model="other").status_code == 404


def test_nobody_knows_a_result_that_was_never_asked_for(served) -> None:
    for response in (served.http.get("/result/x"), served.http.delete("/result/x")):
        assert response.status_code == 404 and response.json()["error"]["code"] == "not_found"


def test_a_job_that_is_deleted_is_aborted(served) -> None:
    with served.held() as steps:
        job = served.post("/generate", **LONG).json()
        steps.run(1)
        deleted = served.http.delete(f"/result/{job['id']}")
        assert deleted.json() == {"id": job["id"], "status": "aborted"}
        served.check_idle()
    assert served.http.get(f"/result/{job['id']}").status_code == 404


def jobs_of(served: Served) -> Jobs:
    return served.server.config.app.state.jobs  # type: ignore[union-attr]


def test_what_is_deleted_takes_nobodys_place() -> None:
    with serving(Settings(max_num_results=2), num_blocks=64) as served:
        kept = [served.post("/generate", prompt="x", max_tokens=1).json()["id"] for _ in range(2)]
        for job in kept:
            poll(served, job)
        with served.held():
            for _ in range(3):
                deleted = served.post("/generate", **LONG).json()["id"]
                served.http.delete(f"/result/{deleted}")
            served.check_idle()
        assert [served.http.get(f"/result/{job}").status_code for job in kept] == [200, 200]
        assert len(jobs_of(served)._jobs) == len(jobs_of(served)._ended) == 2


def test_a_job_that_fails_says_so_to_whoever_asks_and_deletes() -> None:
    with serving(num_blocks=32) as broken:
        broken.server.on_tick = lambda counter: asyncio.sleep(0, False)  # type: ignore[method-assign]
        broken.engine._core.engine.executor.runner.launch = None  # type: ignore[assignment]
        job = broken.post("/generate", prompt="x").json()["id"]
        failed = poll(broken, job)
        assert failed["status"] == "failed" and failed["error"]["code"] == "engine_dead"
        assert broken.http.delete(f"/result/{job}").json() == {"id": job, "status": "failed"}
        del broken.server.on_tick


def test_results_expire_also_where_nobody_asks_any_more() -> None:
    with serving(Settings(result_ttl_s=0.2), num_blocks=32) as served:
        for _ in range(3):
            served.post("/generate", prompt="x", max_tokens=1)
        until(lambda: not jobs_of(served)._jobs)


def test_results_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    with serving(Settings(result_ttl_s=300.0), num_blocks=32) as served:
        job = served.post("/generate", prompt="x", max_tokens=1).json()
        assert poll(served, job["id"])["status"] == "finished"
        clock.now_s = 299.0
        assert poll(served, job["id"])["status"] == "finished"
        clock.now_s = 301.0
        gone = served.http.get(f"/result/{job['id']}")
        assert gone.status_code == 404 and "kept for 300 s" in gone.json()["error"]["message"]


def test_only_so_many_results_are_kept() -> None:
    with serving(Settings(max_num_results=3), num_blocks=32) as served:
        asked = [served.post("/generate", prompt="x", max_tokens=1).json()["id"] for _ in range(5)]
        until(lambda: all(served.http.get(f"/result/{job}").status_code == 404 for job in asked[:2]))
        for job in asked[2:]:
            poll(served, job)
        found = [served.http.get(f"/result/{job}").status_code for job in asked]
        assert found == [404, 404, 200, 200, 200]
        assert len(jobs_of(served)._jobs) == 3
