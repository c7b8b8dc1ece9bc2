"""Every scheduler that goes with a family, made by name and drawn with."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from handler.api.traits import SCHEDULER_SHORT_NAMES
from handler.pipelines.schedulers import compatible_schedulers, least_steps, make_scheduler
from tests.support.pipelines import FAMILIES, build, example_kwargs, image_of, shared

SD_SCHEDULERS = compatible_schedulers(shared("stable_diffusion"))
FLOW = "FlowMatchEulerDiscreteScheduler"


def test_its_own_comes_first_and_none_comes_twice() -> None:
    assert SD_SCHEDULERS[0] == "DDIMScheduler"
    assert len(set(SD_SCHEDULERS)) == len(SD_SCHEDULERS) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_every_compatible_one_can_be_made(family: str) -> None:
    pipeline = shared(family)
    names = compatible_schedulers(pipeline)
    assert names[0] == type(pipeline.scheduler).__name__
    for name in names:
        assert type(make_scheduler(pipeline, name)).__name__ == name


def test_a_pipeline_without_a_scheduler_has_none() -> None:
    class Nothing:
        scheduler = None

    assert compatible_schedulers(Nothing()) == ()
    assert compatible_schedulers(object()) == ()


def test_pndm_needs_no_more_steps_where_it_skips_its_first_ones() -> None:
    pipeline = build("stable_diffusion")
    assert least_steps(pipeline) == {"PNDMScheduler": 4}
    pipeline.scheduler.register_to_config(skip_prk_steps=True)
    assert least_steps(pipeline) == {}
    pipeline.scheduler = make_scheduler(pipeline, "pndm")
    kwargs: dict[str, Any] = example_kwargs("stable_diffusion", 0) | {"num_inference_steps": 1}
    assert torch.isfinite(image_of(pipeline(**kwargs))).all()
    assert least_steps(shared("flux")) == least_steps(object()) == {}


def test_flow_and_noise_schedulers_do_not_mix() -> None:
    assert FLOW not in SD_SCHEDULERS
    assert "DDIMScheduler" not in compatible_schedulers(shared("flux"))
    with pytest.raises(ValueError, match="does not fit"):
        make_scheduler(shared("stable_diffusion"), FLOW)


@pytest.mark.parametrize("name", ["eulr", "", "torch", "UNet2DConditionModel", "DDIMScheduler "])
def test_an_unknown_name_is_refused_with_those_that_fit(name: str) -> None:
    with pytest.raises(ValueError, match=r"this pipeline takes.*DDIMScheduler"):
        make_scheduler(shared("stable_diffusion"), name)


@pytest.mark.parametrize("short", SCHEDULER_SHORT_NAMES)
def test_short_names_are_diffusers_classes(short: str) -> None:
    class_name = SCHEDULER_SHORT_NAMES[short]
    assert hasattr(diffusers, class_name)
    if class_name in SD_SCHEDULERS:
        made = make_scheduler(shared("stable_diffusion"), short)
        assert type(made).__name__ == class_name


def test_each_is_fresh_and_has_the_pipelines_configuration() -> None:
    pipeline = build("stable_diffusion_v")
    first, second = make_scheduler(pipeline, "euler"), make_scheduler(pipeline, "euler")
    assert first is not second
    assert first is not pipeline.scheduler
    assert first.config.prediction_type == "v_prediction"
    assert first.config.beta_schedule == "scaled_linear"


@pytest.mark.parametrize("name", SD_SCHEDULERS)
def test_every_compatible_one_draws_in_its_least_steps(name: str) -> None:
    pipeline = build("stable_diffusion")
    steps = least_steps(pipeline).get(name, 1)
    pipeline.scheduler = make_scheduler(pipeline, name)
    kwargs: dict[str, Any] = example_kwargs("stable_diffusion", 0) | {"num_inference_steps": steps}
    if steps > 1:
        with pytest.raises(ValueError, match="broadcast"):
            pipeline(**kwargs | {"num_inference_steps": steps - 1})
    image = image_of(pipeline(**kwargs))
    assert torch.isfinite(image).all()
    assert image.std() > 0


def test_one_that_the_pipelines_configuration_does_not_suit_is_the_requests_problem() -> None:
    pipeline = build("stable_diffusion")
    solver = diffusers.DPMSolverMultistepScheduler
    pipeline.scheduler = solver.from_config(
        pipeline.scheduler.config, algorithm_type="sde-dpmsolver++"
    )
    with pytest.raises(ValueError, match="'deis' does not go with the configuration"):
        make_scheduler(pipeline, "deis")
