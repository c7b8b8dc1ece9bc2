"""DeepFloyd IF: pixels in three stages, the later ones from a smaller picture."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import diffusers

from tests.support.every_pipeline.parts.unets import pixel_unet
from tests.support.every_pipeline.recipe import Recipe
from tests.support.tiny_models import SIDE_PX

__all__ = ["RECIPES"]

_FIRST: dict[str, Any] = {
    "unet": pixel_unet,
    "scheduler": partial(diffusers.DDPMScheduler, variance_type="learned_range", beta_end=0.002),
}
_LATER = _FIRST | {
    "unet": partial(pixel_unet, 6, class_embed_type="timestep"),
    "image_noising_scheduler": diffusers.DDPMScheduler,
}
_SMALL = SIDE_PX // 2

RECIPES: Mapping[str, Recipe] = {
    "IFPipeline": Recipe(_FIRST),
    "IFImg2ImgPipeline": Recipe(_FIRST),
    "IFInpaintingPipeline": Recipe(_FIRST),
    "IFSuperResolutionPipeline": Recipe(_LATER, {"image": lambda inputs: inputs.picture(_SMALL)}),
    "IFImg2ImgSuperResolutionPipeline": Recipe(
        _LATER,
        {
            "image": lambda inputs: inputs.picture(_SMALL),
            "original_image": lambda inputs: inputs.picture(),
        },
    ),
    "IFInpaintingSuperResolutionPipeline": Recipe(
        _LATER,
        {
            "image": lambda inputs: inputs.picture(_SMALL),
            "original_image": lambda inputs: inputs.picture(),
        },
    ),
}
