"""The server keeps to its OpenAPI document, whatever schemathesis sends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from holding import LIMIT_S
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import Served, serving

PATHS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/generate"),
    ("GET", "/result/{id}"),
    ("DELETE", "/result/{id}"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/health"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A short context: much of what schemathesis sends goes on to its end."""
    with serving(max_num_seqs=16, num_blocks=128, max_model_len=64) as one:
        yield one


@pytest.fixture(scope="module")
def schema(served: Served) -> Any:
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def test_every_route_is_in_the_document(schema) -> None:
    found = {(one.ok().method.upper(), one.ok().path) for one in schema.get_all_operations()}
    assert found == set(PATHS)


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_the_document_is_kept(served: Served, schema, method: str, path: str) -> None:
    operation = schema[path][method]

    @hypothesis.given(case=operation.as_strategy())
    @hypothesis.settings(
        max_examples=20,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def holds(case: Any) -> None:
        # A schema cannot express the vocabulary or the context length: such a 400 does not break it.
        case.call_and_validate(base_url=served.url, timeout=LIMIT_S, excluded_checks=[positive_data_acceptance])

    holds()
    served.check_idle()
