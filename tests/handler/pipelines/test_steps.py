"""What pipelines tell of their steps, and how guided rows stand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest

from handler.pipelines.steps import (
    guides_in_halves,
    is_one_call_a_step,
    num_steps_of,
    several_calls_a_step,
    shortcuts_of,
)
from tests.support.pipelines import build, shared


def of_class(name: str) -> Any:
    return object.__new__(getattr(diffusers, name))


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusion3Pipeline",
        "PixArtSigmaPipeline",
        "SanaPipeline",
    ],
)
def test_guided_rows_that_stand_together(name: str) -> None:
    assert guides_in_halves(type(of_class(name)))


@pytest.mark.parametrize(
    "name",
    [
        "FluxPipeline",  # two calls a step
        "QwenImagePipeline",
        "CosmosTextToWorldPipeline",  # two calls, put together afterwards
        "LuminaPipeline",  # the other way round
        "DiTPipeline",
        "StableCascadeDecoderPipeline",
        "StableDiffusionInstructPix2PixPipeline",  # three parts
        "StableDiffusionPAGPipeline",  # exchanges attention processors
        "StableDiffusionSAGPipeline",
        "ZImagePipeline",
        "DDPMPipeline",  # no guidance
    ],
)
def test_guided_rows_that_do_not(name: str) -> None:
    assert not guides_in_halves(type(of_class(name)))


def test_a_class_without_source_guides_nobody_knows_how() -> None:
    namespace: dict[str, Any] = {}
    exec("class Typed:\n    def __call__(self): pass", namespace)
    assert not guides_in_halves(namespace["Typed"])


@pytest.mark.parametrize(
    ("family", "tells"),
    [
        ("stable_diffusion", True),
        ("stable_diffusion_img2img", True),
        ("flux", True),
        ("pixart_sigma", True),  # to the older callback
        ("kandinsky_2_2_combined", False),
    ],
)
def test_pipelines_that_tell_their_steps(family: str, tells: bool) -> None:
    assert ("step_cache" in shortcuts_of(shared(family))) is tells


def test_schedulers_that_call_more_than_once_a_step() -> None:
    names = several_calls_a_step(shared("stable_diffusion"))
    assert {"HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"} <= names
    assert not {"DDIMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler"} & names


def test_pndm_calls_once_a_step_where_it_skips_its_first_ones() -> None:
    pipeline = build("stable_diffusion")
    skipping = diffusers.PNDMScheduler(skip_prk_steps=True)
    pipeline.scheduler = skipping
    assert "PNDMScheduler" not in several_calls_a_step(pipeline)
    assert is_one_call_a_step(skipping)
    assert not is_one_call_a_step(diffusers.PNDMScheduler())
    assert not is_one_call_a_step(diffusers.HeunDiscreteScheduler())


def test_the_number_of_steps() -> None:
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(7)
    assert num_steps_of(SimpleNamespace(num_timesteps=5, scheduler=scheduler)) == 5
    assert num_steps_of(SimpleNamespace(scheduler=scheduler)) == 7
    assert num_steps_of(None) is None
