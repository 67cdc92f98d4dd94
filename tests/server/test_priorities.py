"""``priority`` over HTTP: to the policy, or refused where none reads it."""

from __future__ import annotations

import pytest
from serving import CHAT, PROMPT, error_of, serving

from paged_infer.control.policies import Priority
from paged_infer.control.step_plan import StepPlan

ROUTES = [("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT), ("/generate", PROMPT)]


class Recorder(Priority):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def plan(self, step: StepPlan) -> None:
        self.seen += [sequence.priority for sequence in step.waiting]
        super().plan(step)


def test_a_priority_reaches_the_policy_from_every_route() -> None:
    policy = Recorder()
    with serving(scheduling_policy=policy, num_blocks=256, max_model_len=192) as served:
        for number, (path, body) in enumerate(ROUTES):
            assert served.post(path, **body, priority=number - 1).status_code in (200, 202)
    assert policy.seen == [-1, 0, 1]


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_priority_that_no_policy_reads_is_refused(served, path: str, body: dict[str, object]) -> None:
    error = error_of(served.post(path, **body, priority=3), 400)
    assert error["param"] == "priority"
    assert error["message"].startswith("priority=3: scheduling_policy='chunked' reads no priorities; 'priority' does")
    assert served.post(path, **body, priority=0).status_code in (200, 202)
    assert error_of(served.post(path, **body, priority="high"), 422)["param"] == "priority"
