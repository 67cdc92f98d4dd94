"""A job's id gives access to its answer: it is unguessable, and only its own client gets it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from serving import CHAT, Served, serving

from paged_infer.engine.snapshot import Snapshot
from paged_infer.engine.snapshot import snapshot as take_snapshot
from paged_infer.server.page.records import snapshot_json
from paged_infer.server.service import new_id

LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}


def while_held(served: Served, work: Callable[[], Any]) -> tuple[Any, Snapshot]:
    """What ``work`` returns, and the engine's state after all that it has queued and before the first step of it."""
    thread, go_on = served.engine._core, threading.Event()
    thread.call(lambda engine: go_on.wait(60))
    try:
        done = work()
        taken = thread.call(take_snapshot)
    finally:
        go_on.set()
    return done, taken.result(60)


def labels(snapshot: Snapshot) -> list[str]:
    return [one["request"] for one in snapshot.sequences]


def test_an_event_names_no_job_by_anything_that_opens_it() -> None:
    with serving(max_num_seqs=4, num_blocks=64) as served:
        job, snapshot = while_held(served, lambda: served.post("/generate", **LONG).json())
        (label,) = labels(snapshot)
        assert job["id"] not in json.dumps(snapshot_json(snapshot))
        for guess in (label, label.rsplit("-", 1)[0], f"{label}-0"):
            assert served.http.get(f"/result/{guess}").status_code == 404
            assert served.http.delete(f"/result/{guess}").status_code == 404
        _, later = while_held(served, lambda: None)
        assert labels(later) in ([label], [])  # the same one, while it is there
        assert served.http.delete(f"/result/{job['id']}").json()["id"] == job["id"]


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", LONG), ("/v1/chat/completions", {**CHAT, "ignore_eos": True})]
)
def test_the_client_of_a_stream_finds_itself_among_the_events_by_how_its_id_begins(path: str, body: Any) -> None:
    with serving(max_num_seqs=4, num_blocks=64) as served:
        seen: list[Snapshot] = []
        engine = served.engine._core.engine
        step = engine.step
        engine.step = lambda *args: (seen.append(take_snapshot(engine)), step(*args))[1]  # type: ignore
        body = {**body, "max_tokens": 3, "stream": True}
        text = served.post(path, **body).text
        (its_id,) = {json.loads(line[6:])["id"] for line in text.split("\n\n") if line[6:7] == "{"}
        shown = {label for snapshot in seen for label in labels(snapshot)}
        assert shown == {f"{its_id.rsplit('-', 1)[0]}-0"} and its_id not in shown


def test_metrics_and_errors_show_no_id_of_a_request() -> None:
    with serving(max_num_seqs=1, max_num_waiting=1, num_blocks=64) as served:
        job, _ = while_held(served, lambda: served.post("/generate", **LONG).json())
        secret = job["id"].rsplit("-", 1)[1]
        refused = served.post("/v1/completions", prompt=["a"] * 9)
        assert refused.status_code == 400
        for text in (refused.text, served.http.get("/metrics").text, served.http.get("/v1/models").text):
            assert secret not in text
        served.http.delete(f"/result/{job['id']}")


def test_an_id_is_as_hard_to_guess_as_a_key() -> None:
    ids = [new_id("gen") for _ in range(1000)]
    assert all(one.startswith(f"{label}-") for one, label in ids)
    secrets = {one.rsplit("-", 1)[1] for one, _ in ids}
    assert len(secrets) == len({label for _, label in ids}) == 1000
    assert {len(secret) for secret in secrets} == {32}  # 128 bits
