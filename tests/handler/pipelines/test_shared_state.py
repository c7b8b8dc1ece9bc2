"""Pipelines whose calls change the shared modules: one at a time, and nothing left behind."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.guiders import (
    AdaptiveProjectedMixGuidance,
    ClassifierFreeGuidance,
    SkipLayerGuidance,
)

from handler.engine import InFlightEngine
from handler.engine.ticket import State
from handler.pipelines.shared_state import SharedState, swaps_processors
from tests.support.pipelines import build, example_kwargs, image_of, shared


def cached_flux() -> Any:
    pipeline = build("flux")
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    return pipeline


PIPELINES = {"stable_diffusion_pag": lambda: build("stable_diffusion_pag"), "flux": cached_flux}
exclusive = pytest.mark.parametrize("family", PIPELINES)


def kwargs_of(family: str, index: int) -> dict[str, Any]:
    return {**example_kwargs(family, index), "num_inference_steps": 5 + index}


@exclusive
def test_calls_run_one_at_a_time_and_equal_their_solo_runs(family: str) -> None:
    expected = [image_of(PIPELINES[family]()(**kwargs_of(family, i))) for i in range(3)]
    engine = InFlightEngine(PIPELINES[family]())
    tickets = [engine.submit(kwargs_of(family, i)) for i in range(3)]
    while engine.has_work:
        engine.step()
        assert sum(ticket.state is State.RUNNING for ticket in tickets) <= 1
    engine.close()
    for ticket, image in zip(tickets, expected, strict=True):
        assert torch.equal(image_of(ticket.result()), image)


@exclusive
@pytest.mark.parametrize("num_ticks", [3, 5, 7])
def test_a_call_cut_short_leaves_nothing_to_the_next(family: str, num_ticks: int) -> None:
    expected = image_of(PIPELINES[family]()(**kwargs_of(family, 1)))
    engine = InFlightEngine(PIPELINES[family]())
    cut = engine.submit(kwargs_of(family, 0))
    for _ in range(num_ticks):
        engine.step()
    assert engine.cancel(cut)
    ticket = engine.submit(kwargs_of(family, 1))
    engine.run()
    engine.close()
    assert torch.equal(image_of(ticket.result()), expected)


def test_the_cache_of_these_tests_skips_something() -> None:
    """The control: without a cache the picture is another."""
    plain = image_of(shared("flux")(**kwargs_of("flux", 0)))
    assert (image_of(cached_flux()(**kwargs_of("flux", 0))) - plain).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["stable_diffusion", "flux", "stable_diffusion_3"])
def test_most_pipelines_change_nothing(family: str) -> None:
    assert not SharedState(shared(family)).is_exclusive


@pytest.mark.parametrize(
    "kind",
    [
        diffusers.StableDiffusionPAGPipeline,
        diffusers.SanaPAGPipeline,
        diffusers.StableDiffusionSAGPipeline,
        diffusers.StableDiffusionAttendAndExcitePipeline,
        diffusers.StableDiffusionPix2PixZeroPipeline,
        diffusers.LEditsPPPipelineStableDiffusionXL,
        diffusers.TextToVideoZeroPipeline,
        diffusers.TextToVideoZeroSDXLPipeline,
    ],
)
def test_pipelines_that_set_attention_processors_are_found_by_their_code(kind: type) -> None:
    assert swaps_processors(kind)


@pytest.mark.parametrize(
    "kind",
    [
        diffusers.StableDiffusionPipeline,
        diffusers.StableDiffusionXLPipeline,
        diffusers.AnimateDiffPipeline,
        diffusers.FluxPipeline,
        diffusers.WanPipeline,
    ],
)
def test_pipelines_that_only_call_their_modules_are_not(kind: type) -> None:
    """Though all of them inherit methods that set processors when a user calls them."""
    assert not swaps_processors(kind)


@pytest.mark.parametrize(
    ("guider", "is_exclusive"),
    [
        (AdaptiveProjectedMixGuidance(), False),
        (ClassifierFreeGuidance(), False),
        (SkipLayerGuidance(skip_layer_guidance_layers=[0]), True),
    ],
)
def test_a_guider_that_hooks_into_the_denoiser_has_it_to_itself(
    guider: Any, is_exclusive: bool
) -> None:
    pipeline = diffusers.MotifVideoPipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None, guider=guider
    )
    assert SharedState(pipeline).is_exclusive is is_exclusive
