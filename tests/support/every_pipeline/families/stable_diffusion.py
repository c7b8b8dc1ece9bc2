"""Stable Diffusion 1 and 2: their own pipelines, and research built on them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import diffusers

from tests.support.every_pipeline.parts.text import clip_image_processor
from tests.support.every_pipeline.parts.unets import unet
from tests.support.every_pipeline.recipe import Recipe
from tests.support.tiny_models import SIDE_PX, vae

__all__ = ["RECIPES"]

_LATENT_PX = SIDE_PX // 2

RECIPES: Mapping[str, Recipe] = {
    "StableDiffusionPipeline": Recipe(),
    "StableDiffusionImg2ImgPipeline": Recipe(),
    "StableDiffusionInpaintPipeline": Recipe(parts={"unet": partial(unet, in_channels=9)}),
    "StableDiffusionInstructPix2PixPipeline": Recipe(
        parts={"unet": partial(unet, in_channels=8)},
        call={"image_guidance_scale": lambda inputs: inputs.pick(1.5, 1.2)},
    ),
    "StableDiffusionImageVariationPipeline": Recipe(
        parts={"feature_extractor": clip_image_processor}
    ),
    "StableDiffusionDepth2ImgPipeline": Recipe(
        parts={
            "unet": partial(unet, in_channels=5),
            "depth_estimator": lambda: None,
            "feature_extractor": lambda: None,
        },
        call={"depth_map": lambda inputs: inputs.rand(1, SIDE_PX, SIDE_PX)},
    ),
    "StableDiffusionUpscalePipeline": Recipe(
        parts={
            "unet": partial(unet, in_channels=7, num_class_embeds=100),
            "low_res_scheduler": diffusers.DDPMScheduler,
        },
        call={"image": lambda inputs: inputs.picture(_LATENT_PX), "noise_level": 20},
    ),
    "StableDiffusionLatentUpscalePipeline": Recipe(
        parts={
            "unet": partial(
                unet,
                in_channels=8,
                out_channels=5,
                time_embedding_type="fourier",
                timestep_post_act="gelu",
                time_cond_proj_dim=144,
            ),
        },
        call={"image": lambda inputs: inputs.randn(1, 4, 8, 8)},
    ),
    "LatentConsistencyModelPipeline": Recipe(
        parts={"unet": partial(unet, time_cond_proj_dim=8)},
    ),
    "LatentConsistencyModelImg2ImgPipeline": Recipe(
        parts={"unet": partial(unet, time_cond_proj_dim=8)},
    ),
    "StableDiffusionPAGPipeline": Recipe(call={"pag_scale": 2.0}),
    "StableDiffusionPAGImg2ImgPipeline": Recipe(call={"pag_scale": 2.0}),
    "StableDiffusionPAGInpaintPipeline": Recipe(
        parts={"unet": partial(unet, in_channels=9)}, call={"pag_scale": 2.0}
    ),
    "StableDiffusionLDM3DPipeline": Recipe(
        parts={"vae": partial(vae, in_channels=6, out_channels=6), "image_encoder": lambda: None}
    ),
    "StableDiffusionPanoramaPipeline": Recipe(call={"height": SIDE_PX, "width": 2 * SIDE_PX}),
    "StableDiffusionSAGPipeline": Recipe(),
    "StableDiffusionPipelineSafe": Recipe(),
    "SemanticStableDiffusionPipeline": Recipe(
        call={"editing_prompt": ["hat"], "edit_warmup_steps": 0}
    ),
    "StableDiffusionAttendAndExcitePipeline": Recipe(
        call={"token_indices": [1], "max_iter_to_alter": 1, "thresholds": {}}
    ),
    "CycleDiffusionPipeline": Recipe(call={"source_prompt": "a boat"}),
}
