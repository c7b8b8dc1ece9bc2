"""handler.pipelines.describe: what a pipeline tells of itself is what it does."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

from handler.pipelines.describe import describe
from tests.support.pipelines import FAMILIES, build, example_kwargs, shared

TEXT_TO_IMAGE = sorted(
    name
    for name in FAMILIES
    if name.split("_")[-1] not in ("prior", "img2img", "inpaint", "controlnet", "2")
)


def _drawn_size(pipeline: Any, kwargs: dict[str, Any], side_px: int) -> tuple[int, ...] | None:
    """The size of a picture of side_px x 3 side_px, or None where the pipeline refuses it."""
    try:
        images = pipeline(**{**kwargs, "height": side_px, "width": 3 * side_px}).images
    except (ValueError, RuntimeError):
        return None
    return tuple(images.shape[1:3])


@pytest.mark.parametrize("family", TEXT_TO_IMAGE)
def test_the_size_multiple_is_what_comes_out_exactly(family: str) -> None:
    pipeline = shared(family)
    multiple = describe(pipeline).size_multiple_px
    side_px = multiple * 5 if multiple < 16 else multiple
    found = _drawn_size(pipeline, example_kwargs(family, 0), side_px)
    assert found == (side_px, 3 * side_px)
    if family == "kandinsky_2_2_combined":
        # Its scale is its decoder's, which it does not tell: what is asked is on the safe side.
        return
    odd_px = side_px + multiple // 2
    found = _drawn_size(pipeline, example_kwargs(family, 0), odd_px)
    assert found != (odd_px, 3 * odd_px)


@pytest.mark.parametrize("num_blocks", [2, 3, 4])
def test_the_size_multiple_with_a_tiny_vae(num_blocks: int) -> None:
    """Its scale is in other fields than AutoencoderKL's, and Stable Diffusion wants 8 at least."""
    channels = (4,) * num_blocks
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1,) * num_blocks,
        num_decoder_blocks=(1,) * num_blocks,
        latent_channels=4,
    )
    parts = {**build("stable_diffusion").components, "vae": vae}
    pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    assert describe(pipeline).size_multiple_px == 8
    kwargs = example_kwargs("stable_diffusion", 0)
    assert _drawn_size(pipeline, kwargs, 40) == (40, 120)
    assert _drawn_size(pipeline, kwargs, 44) is None


def test_describes_what_requests_may_ask() -> None:
    traits = describe(shared("stable_diffusion"))
    assert traits.schedulers[0] == "DDIMScheduler"
    assert {"EulerDiscreteScheduler", "DPMSolverMultistepScheduler"} < set(traits.schedulers)
    assert len(set(traits.schedulers)) == len(traits.schedulers)
    assert {"prompt", "negative_prompt", "guidance_scale"} < traits.parameters
    assert "self" not in traits.parameters
    for name in traits.schedulers:
        scheduler = getattr(diffusers, name)
        scheduler.from_config(shared("stable_diffusion").scheduler.config)
    assert describe(shared("flux")).schedulers == ("FlowMatchEulerDiscreteScheduler",)
