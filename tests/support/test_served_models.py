"""docs/models.md: what it calls served is served, and the rest is refused for what it says."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.pipelines import FAMILIES, shared
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


def tried() -> list[Any]:
    """Those classes; the ones that the other tests have no pipeline of are slow all together."""
    usual = {type(shared(family)).__name__ for family in FAMILIES}
    return [
        pytest.param(name, marks=() if name in usual else pytest.mark.slow) for name in served()
    ]


@pytest.mark.filterwarnings("ignore")  # the libraries', about their own imports and classes
@pytest.mark.parametrize("name", tried())
def test_what_is_called_served_is_packed_loaded_and_drawn_with(name: str) -> None:
    row = try_pipeline(name, tiny_builders()[name])
    assert row.outcome is Outcome.SERVED, row.why


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_the_other_classes_stand_there_with_what_they_are() -> None:
    text = DOCUMENT.read_text()
    assert len(served()) >= 90
    for row in judge_all(builders={}):
        assert f"`{row.name}`" in text
        if row.outcome is Outcome.REFUSED:
            assert f"| `{row.name}` | {row.why} |" in text
            assert row.name not in served()
