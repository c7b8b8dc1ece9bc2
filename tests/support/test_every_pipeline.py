"""The sweep's judge tells what it should: equal, different, refused, and what says nothing."""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline

from tests.support.every_pipeline.direct import Outcome
from tests.support.every_pipeline.inputs import Inputs
from tests.support.every_pipeline.judge import judge
from tests.support.every_pipeline.outputs import arrays_of, difference
from tests.support.every_pipeline.recipe import Recipe, call_arguments

pytestmark = pytest.mark.filterwarnings("ignore")


class _Leaky(DDPMPipeline):
    """Counts the calls of its UNet where all requests see it, and draws by that number."""

    @functools.wraps(DDPMPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.unet.num_calls = 0
        return super().__call__(*args, **kwargs)


def _count_calls(pipeline: Any) -> None:
    def add_number(module: Any, args: Any, output: Any) -> Any:
        module.num_calls += 1
        sample = output[0] if isinstance(output, tuple) else output.sample
        return type(output)(sample=sample + 0.1 * module.num_calls)

    pipeline.unet.register_forward_hook(add_number)


class _Constant(DDPMPipeline):
    """Draws the same whatever it is given."""

    @functools.wraps(DDPMPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["generator"] = torch.Generator().manual_seed(0)
        return super().__call__(*args, **kwargs)


class _Offloading(DDPMPipeline):
    """Looks as if its modules were moved between devices."""

    _all_hooks = ("a hook",)


def test_an_ordinary_pipeline_is_merged_and_equal() -> None:
    verdict = judge(DDPMPipeline, Recipe())
    assert verdict.outcome is Outcome.MERGED
    assert not verdict.why
    assert verdict.merged_forwards > 0


def test_state_that_requests_share_makes_a_difference() -> None:
    verdict = judge(_Leaky, Recipe(prepare=_count_calls))
    assert verdict.outcome is Outcome.DIFFERENT
    assert verdict.largest_difference is not None
    assert verdict.largest_difference > 1e-3


def test_an_output_that_no_seed_changes_says_nothing() -> None:
    verdict = judge(_Constant, Recipe())
    assert (verdict.outcome, verdict.why) == (
        Outcome.NOT_BUILT,
        "another seed changes nothing that shows",
    )


def test_what_the_engine_does_not_take_is_refused() -> None:
    verdict = judge(_Offloading, Recipe())
    assert verdict.outcome is Outcome.REFUSED
    assert "offloads" in verdict.why


def test_a_class_that_takes_too_long_is_given_up() -> None:
    verdict = judge(DDPMPipeline, Recipe(), limit_s=0.001)
    assert (verdict.outcome, verdict.why) == (Outcome.NOT_BUILT, "took longer than 0.001 s")


def test_arguments_are_the_same_each_time() -> None:
    recipe = Recipe(call={"latents": lambda inputs: inputs.randn(1, 3)})
    arguments = partial(call_arguments, _Taking, recipe)
    first, again = arguments(Inputs(0, 1)), arguments(Inputs(0, 1))
    assert torch.equal(first["latents"], again["latents"])
    other = arguments(replace(Inputs(0, 1), index=1))
    assert not torch.equal(first["latents"], other["latents"])


class _Taking:
    def __call__(self, latents: Any, generator: Any) -> None: ...


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (torch.zeros(2), torch.tensor([0.0, 0.5]), 0.5),
        (torch.zeros(2), torch.tensor([0.0, 50.0]), 1.0),
        (torch.zeros(2), torch.zeros(3), float("inf")),
        ([torch.zeros(2)], torch.zeros(2), float("inf")),
        (torch.tensor([float("nan")]), torch.zeros(1), float("inf")),
        ("abc", "abd", 1 / 100),
    ],
)
def test_differences_are_of_the_largest_entry_or_of_one(
    left: Any, right: Any, expected: float
) -> None:
    assert difference(arrays_of(left), arrays_of(right)) == expected
