"""What one request gets of a pipeline: its own state, its own scheduler, its cost."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import numpy
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from handler.engine.ticket import StepEnd, Ticket
from handler.engine.view import make_view
from handler.pipelines.cost import Cost, estimate_cost, least_forwards
from handler.pipelines.schedulers import make_scheduler
from handler.pipelines.signature import call_defaults, unknown_arguments
from tests.support.pipelines import build, example_kwargs, image_of, shared
from tests.support.toy_pipeline import ToyPipeline, toy, toy_kwargs


def ticket(kwargs: dict[str, Any], **fields: Any) -> Ticket:
    return Ticket(kwargs=kwargs, cost=Cost(1, 0), **fields)


# Parameters


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


# Views


def test_a_call_of_a_view_leaves_the_pipeline_as_it_was() -> None:
    pipeline = build("stable_diffusion")
    before, scheduler = dict(vars(pipeline)), copy.deepcopy(vars(pipeline.scheduler))
    config = dict(pipeline.config)
    asked = ticket(example_kwargs("stable_diffusion", 0), scheduler=diffusers.PNDMScheduler())
    view, kwargs = make_view(pipeline, asked)
    view(**kwargs)
    assert vars(pipeline) == before
    assert dict(pipeline.config) == config
    assert vars(pipeline.scheduler).keys() == scheduler.keys()
    assert torch.equal(pipeline.scheduler.timesteps, scheduler["timesteps"])
    assert pipeline.scheduler.num_inference_steps is None


def test_a_view_has_the_modules_and_not_the_scheduler() -> None:
    pipeline = shared("stable_diffusion")
    view, _ = make_view(pipeline, ticket({}))
    assert type(view) is type(pipeline)
    assert view.unet is pipeline.unet
    assert view.scheduler is not pipeline.scheduler
    assert view.scheduler.config == pipeline.scheduler.config


def test_a_view_has_the_scheduler_of_its_request() -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    view, _ = make_view(shared("stable_diffusion"), ticket({}, scheduler=scheduler))
    assert view.scheduler is scheduler


def test_pipelines_within_have_schedulers_of_their_own() -> None:
    outer, inner = build("stable_diffusion"), build("stable_diffusion")
    outer.inner = inner
    view, _ = make_view(outer, ticket({}))
    assert view.inner is not inner
    assert view.inner.unet is inner.unet
    assert view.inner.scheduler is not inner.scheduler


def test_views_draw_no_progress_bars() -> None:
    pipeline = build("stable_diffusion")
    pipeline.set_progress_bar_config(disable=False, desc="theirs")
    view, _ = make_view(pipeline, ticket({}))
    assert view._progress_bar_config["disable"]
    assert not pipeline._progress_bar_config["disable"]


# Steps


def test_steps_are_reported_with_the_latents_of_each() -> None:
    seen: list[StepEnd] = []
    asked = ticket(toy_kwargs(num_inference_steps=4), on_step=seen.append)
    view, kwargs = make_view(toy(), asked)
    view(**kwargs)
    assert [(end.step, end.num_steps) for end in seen] == [(i, 4) for i in (1, 2, 3, 4)]
    assert all(end.latents is not None and end.latents.shape == (1, 4, 8, 8) for end in seen)
    assert (asked.num_steps_done, asked.num_steps) == (4, 4)


def test_steps_are_counted_when_nobody_listens() -> None:
    asked = ticket(toy_kwargs(num_inference_steps=2))
    view, kwargs = make_view(toy(), asked)
    view(**kwargs)
    assert asked.num_steps_done == 2


def test_the_callers_own_callback_is_called_and_obeyed() -> None:
    def zeroed(view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.zeros_like(tensors["latents"])}

    seen: list[StepEnd] = []
    asked = ticket(toy_kwargs(callback_on_step_end=zeroed), on_step=seen.append)
    pipeline = toy()
    view, kwargs = make_view(pipeline, asked)
    images = view(**kwargs).images
    assert torch.equal(images, pipeline(**toy_kwargs(callback_on_step_end=zeroed)).images)
    assert not torch.equal(images, pipeline(**toy_kwargs()).images)
    assert len(seen) == 3


def test_a_callback_object_is_handed_on_untouched() -> None:
    """It declares the tensors that it wants; a function in its place would not."""
    callback = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    arguments = example_kwargs("stable_diffusion", 0)
    expected = image_of(shared("stable_diffusion")(**arguments, callback_on_step_end=callback))
    arguments = example_kwargs("stable_diffusion", 0)
    asked = ticket({**arguments, "callback_on_step_end": callback})
    view, kwargs = make_view(shared("stable_diffusion"), asked)
    assert kwargs["callback_on_step_end"] is callback
    assert torch.equal(image_of(view(**kwargs)), expected)


@pytest.mark.parametrize("scheduler", [None, "HeunDiscreteScheduler"])
def test_the_older_callback_reports_steps_too(scheduler: str | None) -> None:
    """PixArt-Sigma has no other; its own, when one is given, is called as before."""
    pipeline, seen, theirs = shared("pixart_sigma"), list[StepEnd](), list[int]()
    arguments = {**example_kwargs("pixart_sigma", 0), "num_inference_steps": 3}
    asked = ticket(
        {**arguments, "callback": lambda step, t, latents: theirs.append(step)},
        on_step=seen.append,
        scheduler=scheduler and make_scheduler(pipeline, scheduler),
    )
    view, kwargs = make_view(pipeline, asked)
    view(**kwargs)
    assert theirs == [0, 1, 2]
    assert [end.step for end in seen] == [1, 2, 3]
    assert all(end.latents is not None and end.latents.ndim == 4 for end in seen)
    assert asked.num_steps_done == 3
    assert asked.num_steps in ((3,) if scheduler is None else (2, 3))


def test_the_older_callback_keeps_its_own_rate() -> None:
    asked = ticket({**example_kwargs("pixart_sigma", 0), "num_inference_steps": 4})
    asked.kwargs["callback_steps"] = 2
    view, kwargs = make_view(shared("pixart_sigma"), asked)
    view(**kwargs)
    assert asked.num_steps_done == 3


@pytest.mark.parametrize(
    ("kwargs", "steps"),
    [
        ({"num_inference_steps": 7}, 7),
        ({}, 50),
        ({"num_inference_steps": 7, "timesteps": [900, 1]}, 0),
        ({"num_inference_steps": 7, "sigmas": [1.0, 0.1]}, 0),
    ],
)
def test_the_least_steps_are_those_that_nothing_shortens(kwargs: Any, steps: int) -> None:
    assert least_forwards(shared("stable_diffusion"), kwargs) == steps
    assert least_forwards(shared("stable_diffusion_img2img"), kwargs) == 0, "it has a strength"


def test_a_call_without_a_callback_gets_none() -> None:
    class Silent(ToyPipeline):
        def __call__(self, prompt: str) -> None:
            return None

    _, kwargs = make_view(toy(Silent), ticket({"prompt": "a"}))
    assert kwargs == {"prompt": "a"}


# Cost


@pytest.mark.parametrize(
    ("kwargs", "rows", "images"),
    [
        ({}, 2, 1),
        ({"guidance_scale": 1.0}, 1, 1),
        ({"guidance_scale": 1.01}, 2, 1),
        ({"guidance_scale": 0}, 1, 1),
        ({"guidance_scale": None}, 2, 1),
        ({"num_images_per_prompt": 3}, 6, 3),
        ({"prompt": ["a", "b"], "num_images_per_prompt": 2, "guidance_scale": 1.0}, 4, 4),
        ({"prompt_embeds": torch.zeros(3, 6, 8)}, 6, 3),
        ({"prompt_embeds": torch.tensor(0.0)}, 2, 1),
        ({"prompt": [], "guidance_scale": 1.0}, 1, 1),
    ],
)
def test_rows_are_images_doubled_by_guidance(
    kwargs: dict[str, Any], rows: int, images: int
) -> None:
    cost = estimate_cost(shared("stable_diffusion"), {**kwargs, "height": 24, "width": 40})
    assert cost == Cost(rows, images * 24 * 40, 24 * 40)


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (40, 24)),
        torch.zeros(1, 3, 24, 40),
        numpy.zeros((1, 24, 40, 3)),
        numpy.zeros((24, 40, 3)),
        [Image.new("RGB", (40, 24))],
    ],
    ids=["PIL", "tensor", "arrays", "array", "list"],
)
def test_a_picture_to_start_from_tells_the_size(image: Any) -> None:
    """Image-to-image takes no height and width; the memory that it takes has to be bounded too."""
    cost = estimate_cost(shared("stable_diffusion_img2img"), {"image": image})
    assert cost == Cost(2, 24 * 40, 24 * 40)


@pytest.mark.parametrize("image", [[], None, 3, numpy.zeros(3)])
def test_what_is_no_picture_tells_no_size(image: Any) -> None:
    pipeline = shared("stable_diffusion_img2img")
    assert estimate_cost(pipeline, {"image": image}) == estimate_cost(pipeline, {})


@pytest.mark.parametrize("family", ["stable_diffusion", "pixart_sigma", "stable_cascade_prior"])
def test_a_size_that_is_not_given_is_the_pipelines_own(family: str) -> None:
    cost = estimate_cost(shared(family), {"height": None})
    assert cost.pixels > 0


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl", "flux", "sana"])
def test_the_estimate_of_a_plain_call_is_what_its_denoiser_gets(family: str) -> None:
    pipeline = shared(family)
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    for index in (0, 1):
        rows: list[int] = []
        hook = denoiser.register_forward_pre_hook(
            lambda module, args, kwargs, rows=rows: rows.append(
                len(next(v for v in [*args, *kwargs.values()] if isinstance(v, torch.Tensor)))
            ),
            with_kwargs=True,
        )
        kwargs = {**example_kwargs(family, index), "num_images_per_prompt": 2}
        estimate = estimate_cost(pipeline, kwargs)
        try:
            pipeline(**kwargs)
        finally:
            hook.remove()
        # Flux embeds its guidance: counted double, which is more than it takes and never less.
        assert set(rows) == {estimate.rows} or (family == "flux" and set(rows) == {2})
