"""What a client is told of an error inside the engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from handler.errors import (
    Conflict,
    DeviceLost,
    EngineFault,
    InvalidRequest,
    OutOfMemory,
    RequestError,
)
from handler.service.results import as_request_error, fault_of, result_of


class Drawing:
    """A ticket that is done; its call's output has one picture, in the field `name`."""

    submitted_s = admitted_s = ended_s = 0.0
    denoised_s = None

    def __init__(self, name: str) -> None:
        self._output = SimpleNamespace(**{name: ["a picture"]})

    def result(self) -> Any:
        return self._output


@pytest.mark.parametrize("name", ["images", "image"])
def test_pictures_are_taken_from_either_field(name: str) -> None:
    request = cast(Any, SimpleNamespace(prompt="", negative_prompt=None, is_weighted=False))
    found = result_of(cast(Any, Drawing(name)), request, SimpleNamespace(components={}))
    assert found.images == ("a picture",)


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


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), OutOfMemory),
        (RuntimeError("CUDA error: device-side assert triggered"), DeviceLost),
        (ValueError("no"), EngineFault),
    ],
)
def test_a_fault_is_told_by_what_the_error_says_or_in_the_words_of_where_it_was(
    error: Exception, told: type[RequestError]
) -> None:
    found = fault_of(error, "it could not be read")
    assert type(found) is told
    assert found.__cause__ is error
    assert (found.message == "it could not be read") is (told is EngineFault)


def test_a_fault_that_has_a_status_keeps_it() -> None:
    known = Conflict("no")
    assert fault_of(known, "it could not be read") is known
