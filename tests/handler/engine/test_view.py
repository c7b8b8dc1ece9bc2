"""What one request gets of a pipeline: its own state, its own scheduler, its steps reported."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

from handler.engine.ticket import StepEnd, Ticket
from handler.engine.view import make_view
from handler.pipelines.cost import Cost
from handler.pipelines.schedulers import make_scheduler
from tests.support.pipelines import build, example_kwargs, image_of, shared
from tests.support.toy_pipeline import ToyPipeline, toy, toy_kwargs


def ticket(kwargs: dict[str, Any], **fields: Any) -> Ticket:
    return Ticket(kwargs=kwargs, cost=Cost(1, 0), **fields)


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
    assert [end.num_steps for end in seen] == [3, 3, 3]


def test_the_older_callback_keeps_its_own_rate() -> None:
    asked = ticket({**example_kwargs("pixart_sigma", 0), "num_inference_steps": 4})
    asked.kwargs["callback_steps"] = 2
    view, kwargs = make_view(shared("pixart_sigma"), asked)
    view(**kwargs)
    assert asked.num_steps_done == 3


def test_a_call_without_a_callback_gets_none() -> None:
    class Silent(ToyPipeline):
        def __call__(self, prompt: str) -> None:
            return None

    _, kwargs = make_view(toy(Silent), ticket({"prompt": "a"}))
    assert kwargs == {"prompt": "a"}
