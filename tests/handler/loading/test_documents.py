"""handler.loading.documents: JSON of others, or an error of ours."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.errors import ArchiveError
from handler.loading.documents import parse_json


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "NaN", "[Infinity]", b"\xff\xff", ""])
def test_what_is_no_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(ArchiveError, match=r"^a file is not JSON: "):
        parse_json(text, "a file")


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": 1, "b": 1}]', "{}".encode("utf-16")])
def test_what_can_be_understood_in_two_ways_is_refused_where_it_matters(text: str | bytes) -> None:
    parse_json(text, "a file")
    with pytest.raises(ArchiveError, match=r"^a file is not JSON: "):
        parse_json(text, "a file", is_strict=True)


@given(st.binary(max_size=50), st.booleans())
def test_any_bytes_are_json_or_refused(data: bytes, is_strict: bool) -> None:
    """No other error comes out, whatever goes in."""
    with contextlib.suppress(ArchiveError):
        parse_json(data, "fuzz", is_strict=is_strict)
