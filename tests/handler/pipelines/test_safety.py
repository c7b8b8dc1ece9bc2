"""Pictures are checked after they are drawn, and come out as the pipeline's own call gives them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from handler.engine import InFlightEngine
from handler.pipelines.safety import SafetyChecker, has_safety_checker, verdicts_of
from tests.support.pipelines import build, example_kwargs, with_safety_checker


@pytest.mark.parametrize("is_strict", [True, False])
def test_pictures_are_checked_as_the_pipeline_does(is_strict: bool) -> None:
    pipeline = with_safety_checker(is_strict=is_strict)
    kwargs = {"output_type": "pil", "num_images_per_prompt": 2}
    own = pipeline(**example_kwargs("stable_diffusion", 0) | kwargs)
    assert own.nsfw_content_detected == [is_strict] * 2
    engine = InFlightEngine(pipeline)
    checker = SafetyChecker.take_from([pipeline])
    assert checker is not None
    ticket = engine.submit(example_kwargs("stable_diffusion", 0) | kwargs)
    engine.run()
    assert verdicts_of(ticket.result()) == ()
    drawn = ticket.result().images
    assert np.asarray(drawn[0]).max() > 0
    images, flagged = checker.check(drawn)
    assert flagged == (is_strict, is_strict)
    for image, wanted in zip(images, own.images, strict=True):
        assert abs(np.asarray(image).astype(int) - np.asarray(wanted)).max() <= 1
        assert (np.asarray(image).max() == 0) == is_strict
    engine.close()


def test_the_pipelines_get_their_checker_back() -> None:
    pipeline, other = with_safety_checker(is_strict=True), build("stable_diffusion")
    config, module = dict(pipeline.config), pipeline.safety_checker
    checker = SafetyChecker.take_from([other, pipeline])
    assert checker is not None
    assert not has_safety_checker(pipeline)
    checker.give_back()
    assert pipeline.safety_checker is module
    assert dict(pipeline.config) == config
    assert not has_safety_checker(other)


def test_a_pipeline_that_marks_its_pictures_checks_them_itself() -> None:
    pipeline = with_safety_checker(is_strict=True)
    pipeline.watermarker = object()
    assert SafetyChecker.take_from([pipeline]) is None
    assert has_safety_checker(pipeline)
    assert SafetyChecker.take_from([build("stable_diffusion"), build("flux")]) is None


@pytest.mark.parametrize(
    ("output", "verdicts"),
    [
        ({"nsfw_content_detected": [True, False]}, (True, False)),
        ({"nsfw_detected": [False, False], "watermark_detected": [False, True]}, (False, True)),
        ({"nsfw_content_detected": None}, ()),
        ({}, ()),
    ],
)
def test_the_word_of_a_pipeline_that_checks_itself_is_read(
    output: dict[str, list[bool] | None], verdicts: tuple[bool, ...]
) -> None:
    assert verdicts_of(SimpleNamespace(images=[], **output)) == verdicts
