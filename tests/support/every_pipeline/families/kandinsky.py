"""Kandinsky 2.1 and 2.2, unCLIP and its relatives: a prior and a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)

from tests.support.every_pipeline.inputs import Inputs
from tests.support.every_pipeline.parts.text import CLIP_WIDTH, clip_image_processor
from tests.support.every_pipeline.parts.unets import prior, unet
from tests.support.every_pipeline.recipe import Recipe

__all__ = ["RECIPES"]

_LEARNED_VARIANCE = partial(
    diffusers.DDPMScheduler, variance_type="learned_range", clip_sample=True
)


def _unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    settings = {
        "out_channels": 8,  # mean and variance
        "encoder_hid_dim": CLIP_WIDTH,
        "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    }
    return unet(**{**settings, **changes})


_text_unet = partial(
    _unet,
    encoder_hid_dim_type="text_image_proj",
    addition_embed_type="text_image",
)
_image_unet = partial(_unet, encoder_hid_dim_type="image_proj", addition_embed_type="image")
_hint_unet = partial(
    _unet, in_channels=8, encoder_hid_dim_type="image_proj", addition_embed_type="image_hint"
)
_prior = partial(prior, additional_embeddings=4)


def _embeds(inputs: Inputs) -> torch.Tensor:
    return inputs.randn(1, CLIP_WIDTH)


_EMBEDS = {"image_embeds": _embeds, "negative_image_embeds": _embeds}
_HINT = {"hint": lambda inputs: inputs.rand(1, 3, 128, 128)}

_OLD = {"unet": _text_unet, "scheduler": _LEARNED_VARIANCE}
_NEW = {"unet": _image_unet, "scheduler": _LEARNED_VARIANCE}
_WITH_HINT = _NEW | {"unet": _hint_unet}
_INPAINT = {"in_channels": 9}
_COMBINED = {"prior_prior": _prior}
_PRIOR_STEPS = {"prior_num_inference_steps": lambda inputs: inputs.pick(2, 3)}


RECIPES: Mapping[str, Recipe] = {
    "KandinskyPipeline": Recipe(_OLD, _EMBEDS),
    "KandinskyImg2ImgPipeline": Recipe(_OLD, _EMBEDS),
    "KandinskyInpaintPipeline": Recipe(_OLD | {"unet": partial(_text_unet, **_INPAINT)}, _EMBEDS),
    "KandinskyPriorPipeline": Recipe({"prior": _prior}),
    "KandinskyCombinedPipeline": Recipe(_OLD | _COMBINED, _PRIOR_STEPS),
    "KandinskyImg2ImgCombinedPipeline": Recipe(_OLD | _COMBINED, _PRIOR_STEPS),
    "KandinskyInpaintCombinedPipeline": Recipe(
        _OLD | _COMBINED | {"unet": partial(_text_unet, **_INPAINT)}, _PRIOR_STEPS
    ),
    "KandinskyV22Pipeline": Recipe(_NEW, _EMBEDS),
    "KandinskyV22Img2ImgPipeline": Recipe(_NEW, _EMBEDS),
    "KandinskyV22InpaintPipeline": Recipe(
        _NEW | {"unet": partial(_image_unet, **_INPAINT)}, _EMBEDS
    ),
    "KandinskyV22ControlnetPipeline": Recipe(_WITH_HINT, _EMBEDS | _HINT),
    "KandinskyV22ControlnetImg2ImgPipeline": Recipe(_WITH_HINT, _EMBEDS | _HINT),
    "KandinskyV22PriorPipeline": Recipe({"prior": _prior}),
    "KandinskyV22PriorEmb2EmbPipeline": Recipe(
        {"prior": _prior},
        {"image": _embeds, "num_inference_steps": lambda inputs: inputs.pick(4, 5)},
    ),
    "KandinskyV22CombinedPipeline": Recipe(_NEW | _COMBINED, _PRIOR_STEPS),
    "KandinskyV22Img2ImgCombinedPipeline": Recipe(_NEW | _COMBINED, _PRIOR_STEPS),
    "KandinskyV22InpaintCombinedPipeline": Recipe(
        _NEW | _COMBINED | {"unet": partial(_image_unet, **_INPAINT)}, _PRIOR_STEPS
    ),
    "StableUnCLIPPipeline": Recipe(
        {
            "prior": prior,
            "unet": partial(
                unet,
                class_embed_type="projection",
                projection_class_embeddings_input_dim=2 * CLIP_WIDTH,
            ),
            "image_normalizer": partial(StableUnCLIPImageNormalizer, embedding_dim=CLIP_WIDTH),
            "image_noising_scheduler": diffusers.DDPMScheduler,
            "prior_scheduler": partial(diffusers.DDPMScheduler, prediction_type="sample"),
        },
        _PRIOR_STEPS,
    ),
    "StableUnCLIPImg2ImgPipeline": Recipe(
        {
            "feature_extractor": clip_image_processor,
            "unet": partial(
                unet,
                class_embed_type="projection",
                projection_class_embeddings_input_dim=2 * CLIP_WIDTH,
            ),
            "image_normalizer": partial(StableUnCLIPImageNormalizer, embedding_dim=CLIP_WIDTH),
            "image_noising_scheduler": diffusers.DDPMScheduler,
        },
    ),
}
