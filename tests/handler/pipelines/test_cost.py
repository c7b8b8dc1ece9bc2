"""What one call of a pipeline will occupy, and how many forwards it takes at the least."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from handler.pipelines.cost import Cost, estimate_cost, least_forwards
from tests.support.pipelines import example_kwargs, shared


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


@pytest.mark.parametrize("num_steps", [1, 7, 10])
@pytest.mark.parametrize("strength", [None, 0.3, 0.55, 0.99, 1.0])
@pytest.mark.parametrize("family", ["stable_diffusion_img2img", "stable_diffusion_inpaint"])
def test_strength_leaves_out_steps_as_diffusers_counts_them(
    family: str, strength: float | None, num_steps: int
) -> None:
    pipeline = shared(family)
    kwargs = {**example_kwargs(family, 1), "num_inference_steps": num_steps}
    kwargs.pop("strength")
    if strength is not None:
        kwargs["strength"] = strength
    num_forwards: list[int] = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, args: num_forwards.append(1))
    try:
        pipeline(**kwargs)
    except (IndexError, RuntimeError, ValueError):
        assert not num_forwards, "what diffusers makes of no steps at all"
    finally:
        hook.remove()
    assert least_forwards(pipeline, kwargs) == len(num_forwards)


def test_an_enlarged_picture_costs_what_comes_out() -> None:
    pipeline = _Enlarging()
    cost = estimate_cost(pipeline, {"image": Image.new("RGB", (16, 8)), "guidance_scale": 1.0})
    assert cost == Cost(1, 64 * 32, 64 * 32)


class _Enlarging:
    def __call__(self, image: Any, guidance_scale: float = 9.0) -> None: ...


_Enlarging.__name__ = "StableDiffusionUpscalePipeline"
