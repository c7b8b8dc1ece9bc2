"""Calls of a pipeline itself, with no engine on it: what its requests are compared with."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import Enum

import diffusers
import numpy
import torch
from diffusers import DiffusionPipeline

from handler.pipelines.schedulers import compatible_schedulers
from tests.support.every_pipeline.inputs import Inputs
from tests.support.every_pipeline.outputs import Arrays, arrays_of, is_finite
from tests.support.every_pipeline.recipe import NotBuildable, Recipe, call_arguments

__all__ = [
    "Failed",
    "Outcome",
    "Request",
    "direct_call",
    "in_one_line",
    "make_requests",
    "seed_everything",
]

# Schedulers that one of the requests may have instead of the pipeline's own, the best known first.
_OTHER_SCHEDULERS = (
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DDIMScheduler",
)


class Outcome(Enum):
    """How a pipeline fares in flight."""

    MERGED = "merged and equal"
    ALONE = "alone and equal"
    REFUSED = "refused"
    DIFFERENT = "different"
    NOT_BUILT = "not built"


class Failed(Exception):
    """A verdict that ends the judging early."""

    def __init__(self, outcome: Outcome, why: str) -> None:
        super().__init__(why)
        self.outcome, self.why = outcome, why


@dataclass
class Request:
    """One call: what it is given, and the scheduler that it runs with."""

    inputs: Inputs
    scheduler: str | None = None
    expected: Arrays = field(default_factory=dict)


def make_requests(pipeline: DiffusionPipeline, recipe: Recipe) -> list[Request]:
    """The requests with what each gives when the pipeline is called directly."""
    requests = []
    for index in range(recipe.num_requests):
        request = Request(Inputs(index, 1000 + index))
        request.expected = _first_call(pipeline, recipe, request)
        requests.append(request)
    _give_another_scheduler(pipeline, recipe, requests[-1])
    return requests


def _first_call(pipeline: DiffusionPipeline, recipe: Recipe, request: Request) -> Arrays:
    try:
        arrays = direct_call(pipeline, recipe, request)
    except NotBuildable as error:
        raise Failed(Outcome.NOT_BUILT, str(error)) from error
    except Exception as error:
        raise Failed(Outcome.NOT_BUILT, f"calling it: {in_one_line(error)}") from error
    if not arrays or not is_finite(arrays):
        raise Failed(Outcome.NOT_BUILT, "its output has no numbers, or not only finite ones")
    return arrays


def _give_another_scheduler(pipeline: DiffusionPipeline, recipe: Recipe, request: Request) -> None:
    """Let `request` run with another scheduler, where one works with this pipeline."""
    compatible = compatible_schedulers(pipeline)
    for name in _OTHER_SCHEDULERS:
        if name in compatible[1:]:
            other = Request(request.inputs, name)
            try:
                other.expected = direct_call(pipeline, recipe, other)
            except Exception:
                continue
            if is_finite(other.expected):
                request.scheduler, request.expected = name, other.expected
                return


def direct_call(
    pipeline: DiffusionPipeline, recipe: Recipe, request: Request, global_seed: int | None = None
) -> Arrays:
    """The output of the pipeline called directly, with no engine on it."""
    own = getattr(pipeline, "scheduler", None)
    if request.scheduler is not None:
        scheduler_type = getattr(diffusers, request.scheduler)
        pipeline.scheduler = scheduler_type.from_config(own.config)
    seed_everything(request.inputs.seed if global_seed is None else global_seed)
    try:
        arguments = call_arguments(type(pipeline), recipe, request.inputs)
        with torch.no_grad():
            return arrays_of(pipeline(**arguments))
    finally:
        if request.scheduler is not None:
            pipeline.scheduler = own


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)


def in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
