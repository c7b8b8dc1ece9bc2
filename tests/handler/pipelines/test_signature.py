"""The parameters of a pipeline's ``__call__``, those that it passes on included."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

from handler.pipelines.signature import call_defaults, unknown_arguments
from tests.support.pipelines import shared
from tests.support.toy_pipeline import ToyPipeline, toy


def test_the_parameters_are_those_of_the_call() -> None:
    defaults = call_defaults(shared("stable_diffusion"))
    assert defaults["num_inference_steps"] == 50
    assert "self" not in defaults
    assert "kwargs" not in defaults


class Wrapped(ToyPipeline):
    def __call__(self, *args: Any, num_inference_steps: int = 9, **kwargs: Any) -> Any:
        return super().__call__(*args, num_inference_steps=num_inference_steps, **kwargs)


class WrappedTwice(Wrapped):
    def __call__(self, style: str = "", **kwargs: Any) -> Any:
        return super().__call__(**kwargs)


class Anything(diffusers.DiffusionPipeline):
    def __call__(self, prompt: str, **options: Any) -> Any:
        return options


def test_a_wrapper_has_the_parameters_of_what_it_wraps() -> None:
    defaults = call_defaults(toy(WrappedTwice))
    assert defaults["style"] == ""
    assert defaults["num_inference_steps"] == 9
    assert defaults["guidance_scale"] == call_defaults(toy())["guidance_scale"]
    assert unknown_arguments(toy(WrappedTwice), {"style": "", "generator": None}) == []
    assert unknown_arguments(toy(WrappedTwice), {"styl": "", "b": 1}) == ["b", "styl"]


@pytest.mark.parametrize(
    ("pipeline", "unknown"),
    [
        (toy(), ["negative_prompt", "self", "step"]),
        # Its **kwargs only takes arguments of long ago.
        (shared("stable_diffusion"), ["self", "step"]),
        (Anything(), []),
    ],
    ids=["closed", "diffusers", "open"],
)
def test_arguments_that_a_call_does_not_have_are_named(pipeline: Any, unknown: list[str]) -> None:
    asked = {"prompt": "a", "step": 3, "negative_prompt": "b", "self": None}
    assert unknown_arguments(pipeline, asked) == unknown
