"""Stable Cascade, Würstchen and Kandinsky 3."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import (
    WuerstchenDiffNeXt,
)
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior

from tests.support.every_pipeline.parts.text import (
    CLIP_WIDTH,
    T5_WIDTH,
    clip_image_processor,
    clip_vision,
)
from tests.support.every_pipeline.recipe import Recipe
from tests.support.tiny_models import clip

__all__ = ["RECIPES"]


def _cascade_unet(**changes: Any) -> diffusers.StableCascadeUNet:
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "timestep_ratio_embedding_dim": 8,
        "conditioning_dim": 16,
        "block_out_channels": (8, 16),
        "num_attention_heads": (1, 2),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
        "clip_text_pooled_in_channels": CLIP_WIDTH,
        "clip_seq": 2,
        "dropout": (0.0, 0.0),
    }
    return diffusers.StableCascadeUNet(**{**settings, **changes})


_prior = partial(
    _cascade_unet,
    clip_text_in_channels=CLIP_WIDTH,
    clip_image_in_channels=CLIP_WIDTH,
    switch_level=[False],
)
_decoder = partial(_cascade_unet, effnet_in_channels=4, patch_size=1)
_projected = partial(clip, projected=True, act="gelu")
_paella = partial(PaellaVQModel, bottleneck_blocks=1, num_vq_embeddings=8, embed_dim=8)
_wuerstchen_prior = partial(
    WuerstchenPrior, c_in=4, c=16, c_cond=CLIP_WIDTH, c_r=8, depth=1, nhead=2, dropout=0.0
)


def _divide_by_much(pipeline: Any) -> None:
    """Keep what the prior divides by away from nothing, where rounding would become large."""
    prior = getattr(pipeline, "prior", None) or pipeline.prior_pipe.prior
    scale = prior.out[1] if isinstance(prior.out, torch.nn.Sequential) else prior.out
    scale.bias.data[len(scale.bias) // 2 :] += 3.0


_wuerstchen_decoder = partial(
    WuerstchenDiffNeXt,
    c_cond=16,
    c_r=8,
    c_hidden=[8, 16],
    nhead=[-1, 2],
    blocks=[1, 1],
    level_config=["CT", "CTA"],
    inject_effnet=[False, True],
    effnet_embd=4,
    clip_embd=CLIP_WIDTH,
    dropout=0.0,
)
_PRIOR_STEPS = {"prior_num_inference_steps": lambda inputs: inputs.pick(2, 3)}
_KANDINSKY_3 = {
    "unet": partial(
        diffusers.Kandinsky3UNet,
        time_embedding_dim=8,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(8, 16),
        cross_attention_dim=8,
        encoder_hid_dim=T5_WIDTH,
    ),
}

RECIPES: Mapping[str, Recipe] = {
    "StableCascadePriorPipeline": Recipe(
        {"prior": _prior, "text_encoder": _projected, "resolution_multiple": lambda: 4.0}
    ),
    "StableCascadeDecoderPipeline": Recipe(
        {
            "decoder": _decoder,
            "text_encoder": _projected,
            "vqgan": _paella,
            "latent_dim_scale": lambda: 4.0,
        },
        {"image_embeddings": lambda inputs: inputs.randn(1, 4, 4, 4)},
    ),
    "StableCascadeCombinedPipeline": Recipe(
        {
            "decoder": _decoder,
            "text_encoder": _projected,
            "vqgan": _paella,
            "prior_prior": _prior,
            "prior_text_encoder": _projected,
            "prior_feature_extractor": clip_image_processor,
            "prior_image_encoder": clip_vision,
        },
        _PRIOR_STEPS,
    ),
    "WuerstchenPriorPipeline": Recipe(
        {"prior": _wuerstchen_prior, "resolution_multiple": lambda: 4.0},
        prepare=_divide_by_much,
    ),
    "WuerstchenDecoderPipeline": Recipe(
        {"decoder": _wuerstchen_decoder, "vqgan": _paella, "latent_dim_scale": lambda: 4.0},
        {"image_embeddings": lambda inputs: inputs.randn(1, 4, 4, 4)},
    ),
    "WuerstchenCombinedPipeline": Recipe(
        {"decoder": _wuerstchen_decoder, "vqgan": _paella, "prior_prior": _wuerstchen_prior},
        _PRIOR_STEPS,
    ),
    "Kandinsky3Pipeline": Recipe(_KANDINSKY_3),
    "Kandinsky3Img2ImgPipeline": Recipe(_KANDINSKY_3),
}
