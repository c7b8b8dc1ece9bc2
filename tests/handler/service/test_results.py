"""What a client is told of an error inside the engine."""

from __future__ import annotations

import pytest

from handler.errors import EngineFault, InvalidRequest, OutOfMemory, RequestError
from handler.service.results import as_request_error


def test_an_error_with_a_status_keeps_it() -> None:
    known = InvalidRequest("no")
    assert as_request_error(known, 0) is known


@pytest.mark.parametrize(
    ("error", "num_steps_done", "told"),
    [
        (MemoryError(), 0, OutOfMemory),
        (RuntimeError("CUDA out of memory"), 0, OutOfMemory),
        (ValueError("no"), 0, InvalidRequest),
        (ValueError("no"), 1, EngineFault),
        (KeyError("no"), 0, EngineFault),
    ],
)
def test_another_error_gets_one_and_is_its_cause(
    error: Exception, num_steps_done: int, told: type[RequestError]
) -> None:
    found = as_request_error(error, num_steps_done)
    assert type(found) is told
    assert found.__cause__ is error


def test_what_the_pipeline_says_of_its_own_faults_is_not_told() -> None:
    assert "secret" not in as_request_error(KeyError("a secret"), 0).message
