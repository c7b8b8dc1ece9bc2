"""The error tree: every request error is a status, a code and a body of one shape."""

from __future__ import annotations

import inspect

import pytest

from handler import errors
from handler.errors import (
    ArchiveError,
    ConfigError,
    DeviceLost,
    Draining,
    InvalidRequest,
    QueueFull,
    RequestError,
    ServingError,
)

CLASSES = [
    c
    for name, c in inspect.getmembers(errors, inspect.isclass)
    if c.__module__ == "handler.errors" and not name.startswith("_")
]
REQUEST_ERRORS = [c for c in CLASSES if issubclass(c, RequestError) and c is not RequestError]


def test_all_names_every_class() -> None:
    assert sorted(errors.__all__) == sorted(c.__name__ for c in CLASSES)


def test_the_tree_that_the_docstring_draws() -> None:
    drawn = inspect.getdoc(errors) or ""
    for cls in CLASSES:
        assert cls.__name__ in drawn
    for cls in REQUEST_ERRORS:
        line = next(line for line in drawn.splitlines() if f" {cls.__name__} " in line)
        assert str(cls.status) in line.split(), line


@pytest.mark.parametrize("cls", REQUEST_ERRORS)
def test_each_request_error_is_one_http_error(cls: type[RequestError]) -> None:
    error = cls("what happened")
    assert 400 <= error.status < 600
    assert error.phrase.isascii()
    assert str(error) == error.message == "what happened"
    assert error.body() == {"error": {"code": cls.code, "message": "what happened", "fields": {}}}


def test_codes_tell_the_errors_apart() -> None:
    codes = [cls.code for cls in REQUEST_ERRORS]
    statuses = [cls.status for cls in REQUEST_ERRORS]
    assert len(set(codes)) == len(codes)
    assert {status for status in statuses if statuses.count(status) > 1} == {500, 503}


def test_fields_are_copied_into_the_body() -> None:
    fields = {"seed": "is not an integer"}
    error = InvalidRequest("seed: is not an integer", fields)
    fields.clear()
    assert error.body()["error"] == {
        "code": "invalid_request",
        "message": "seed: is not an integer",
        "fields": {"seed": "is not an integer"},
    }


@pytest.mark.parametrize("cls", [QueueFull, Draining, DeviceLost])
def test_who_is_only_busy_says_when_to_come_again(
    cls: type[QueueFull] | type[Draining] | type[DeviceLost],
) -> None:
    assert cls("full", retry_after_s=7).headers == {"Retry-After": "7"}
    assert int(cls("full").headers["Retry-After"]) >= 1
    assert InvalidRequest("no").headers == {}


def test_start_up_errors_are_no_request_errors() -> None:
    for cls in (ConfigError, ArchiveError):
        assert issubclass(cls, ServingError)
        assert not issubclass(cls, RequestError)
