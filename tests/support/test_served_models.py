"""docs/models.md: what it calls served is served, and the rest is refused for what it says."""

from __future__ import annotations

import re

import pytest

from tests.support.served_models import (
    DOCUMENT,
    Outcome,
    judge_all,
    tiny_builders,
    try_pipeline,
)


def served() -> list[str]:
    """The classes that the document calls served."""
    section = DOCUMENT.read_text().partition("## Served")[2].partition("##")[0]
    return re.findall(r"`(\w+)`", section)


@pytest.mark.parametrize("name", served())
def test_what_is_called_served_is_packed_loaded_and_drawn_with(name: str) -> None:
    row = try_pipeline(name, tiny_builders()[name])
    assert row.outcome is Outcome.SERVED, row.why


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_the_other_classes_stand_there_with_what_they_are() -> None:
    text = DOCUMENT.read_text()
    assert len(served()) >= 10
    for row in judge_all(builders={}):
        assert f"`{row.name}`" in text
        if row.outcome is Outcome.REFUSED:
            assert f"| `{row.name}` | {row.why} |" in text
            assert row.name not in served()
