"""Fixtures of the server's tests: see ``serving``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import Served, serving

from paged_infer import LLM


@pytest.fixture(scope="session")
def storyteller_server() -> Iterator[Served]:
    """One for all tests that leave it as they found it."""
    with serving(max_num_seqs=16, num_blocks=512, max_model_len=192) as served:
        yield served


@pytest.fixture
def served(storyteller_server: Served) -> Iterator[Served]:
    yield storyteller_server
    storyteller_server.check_idle()


@pytest.fixture(scope="session")
def storyteller() -> LLM:
    """What the server has to agree with."""
    return LLM(device="cpu", max_num_seqs=16, num_blocks=512, max_model_len=192)
