"""Each pipeline class of diffusers fares in flight as recorded in every_pipeline.json.

The record says what is true, good or bad: a class that gets worse fails here, and one that gets
better does too, until ``python -m tests.support.every_pipeline --only CLASS --write`` records it.
"""

from __future__ import annotations

import pytest

from tests.support.every_pipeline import record
from tests.support.every_pipeline.catalogue import pipeline_classes
from tests.support.every_pipeline.families import RECIPES
from tests.support.every_pipeline.judge import judge
from tests.support.every_pipeline.recipe import Recipe

RECORD = record.load()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RECORD.entries)
def test_a_pipeline_fares_as_recorded(name: str) -> None:
    verdict = judge(pipeline_classes()[name], RECIPES.get(name, Recipe()))
    assert verdict.outcome is RECORD.entries[name].outcome, verdict.why


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_class_is_recorded() -> None:
    assert set(RECORD.entries) == set(pipeline_classes())


def test_recipes_are_of_recorded_classes() -> None:
    assert set(RECIPES) <= set(RECORD.entries)


def test_the_document_is_made_from_the_record() -> None:
    assert record.render(RECORD) == record.DOCUMENT.read_text()
