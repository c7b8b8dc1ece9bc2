"""Pipelines that draw from noise alone, or from a class label."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import diffusers

from tests.support.every_pipeline.parts.autoencoders import vq
from tests.support.every_pipeline.parts.unets import unet_2d
from tests.support.every_pipeline.recipe import Recipe

__all__ = ["RECIPES"]

_DIT = partial(
    diffusers.DiTTransformer2DModel,
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    sample_size=8,
    num_embeds_ada_norm=1000,
    norm_num_groups=1,
)

RECIPES: Mapping[str, Recipe] = {
    "DDIMPipeline": Recipe(call={"eta": 1.0}),
    "DDPMPipeline": Recipe(),
    "ConsistencyModelPipeline": Recipe(),
    "DiTPipeline": Recipe(
        {"transformer": _DIT},
        {"class_labels": lambda inputs: [inputs.index]},
    ),
    "LDMPipeline": Recipe(
        {
            "unet": partial(unet_2d, in_channels=4, out_channels=4),
            "vqvae": partial(vq, norm_type="group"),
        }
    ),
    "PNDMPipeline": Recipe(
        {"scheduler": diffusers.PNDMScheduler}, {"num_inference_steps": lambda i: i.pick(4, 5)}
    ),
}
