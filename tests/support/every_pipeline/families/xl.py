"""Stable Diffusion XL and the pipelines built on it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from tests.support.every_pipeline.parts.unets import xl_unet
from tests.support.every_pipeline.recipe import Recipe
from tests.support.tiny_models import vae

__all__ = ["RECIPES"]

_PARTS = {"unet": xl_unet, "vae": partial(vae, force_upcast=True)}
# With an aesthetic score there are five numbers beside the size: two sizes and it.
_REFINER = {**_PARTS, "unet": partial(xl_unet, 5)}
_INPAINT = {**_PARTS, "unet": partial(xl_unet, in_channels=9)}


RECIPES: Mapping[str, Recipe] = {
    "StableDiffusionXLPipeline": Recipe(_PARTS),
    "StableDiffusionXLImg2ImgPipeline": Recipe(
        _REFINER | {"requires_aesthetics_score": lambda: True}
    ),
    "StableDiffusionXLInpaintPipeline": Recipe(_INPAINT),
    "StableDiffusionXLInstructPix2PixPipeline": Recipe(
        _PARTS | {"unet": partial(xl_unet, in_channels=8)}
    ),
    "StableDiffusionXLPAGPipeline": Recipe(_PARTS, {"pag_scale": 2.0}),
    "StableDiffusionXLPAGImg2ImgPipeline": Recipe(_PARTS, {"pag_scale": 2.0}),
    "StableDiffusionXLPAGInpaintPipeline": Recipe(_INPAINT, {"pag_scale": 2.0}),
}
