"""Pictures by transformers: Stable Diffusion 3, PixArt, Sana, Lumina, CogView, Z-Image."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import diffusers
import torch

from tests.support.every_pipeline.parts.autoencoders import flow_vae_of
from tests.support.every_pipeline.parts.image_transformers import tiny
from tests.support.every_pipeline.recipe import Recipe
from tests.support.tiny_models import flow_vae, qwen3, qwen_tokenizer

__all__ = ["RECIPES"]

_VAE = {"vae": flow_vae}
_SCALE = {"controlnet_conditioning_scale": lambda inputs: inputs.pick(0.5, 1.0)}
_PAG = {"pag_scale": 2.0}
_INSTRUCTION = {"complex_human_instruction": ["describe: "]}
_PAG_LAYERS = {"pag_applied_layers": lambda: ["blocks.1"]}
_ONE_STEP_FEW = {"num_inference_steps": 2}
_SPRINT = {
    "transformer": partial(tiny, "SanaTransformer2DModel", guidance_embeds=True),
    "scheduler": diffusers.SCMScheduler,
}
_QWEN3 = _VAE | {"text_encoder": qwen3, "tokenizer": qwen_tokenizer}


def _fill_pad_token(pipeline: Any) -> None:
    """Give Lumina's pad token a value: it leaves it as the memory was."""
    torch.nn.init.normal_(pipeline.transformer.pad_token)


RECIPES: Mapping[str, Recipe] = {
    **dict.fromkeys(
        (
            "StableDiffusion3Pipeline",
            "StableDiffusion3Img2ImgPipeline",
        ),
        Recipe(_VAE),
    ),
    "StableDiffusion3InpaintPipeline": Recipe(
        {
            "vae": partial(flow_vae_of, 16),
            "transformer": partial(tiny, "SD3Transformer2DModel", in_channels=16, out_channels=16),
        }
    ),
    **dict.fromkeys(
        ("StableDiffusion3PAGPipeline", "StableDiffusion3PAGImg2ImgPipeline"),
        Recipe(_VAE | _PAG_LAYERS, _PAG),
    ),
    "StableDiffusion3ControlNetPipeline": Recipe(_VAE, _SCALE),
    "StableDiffusion3ControlNetInpaintingPipeline": Recipe(
        _VAE | {"controlnet": partial(tiny, "SD3ControlNetModel", extra_conditioning_channels=1)},
        _SCALE,
    ),
    "PixArtAlphaPipeline": Recipe(),
    "PixArtSigmaPipeline": Recipe(),
    "PixArtSigmaPAGPipeline": Recipe(_PAG_LAYERS, _PAG),
    "AuraFlowPipeline": Recipe(_VAE),
    "SanaPipeline": Recipe(call=_INSTRUCTION),
    "SanaPAGPipeline": Recipe(
        _PAG_LAYERS | {"pag_applied_layers": lambda: ["transformer_blocks.1"]}, _PAG | _INSTRUCTION
    ),
    "SanaControlNetPipeline": Recipe(call=_INSTRUCTION | _SCALE),
    "SanaSprintPipeline": Recipe(
        _SPRINT,
        _INSTRUCTION | _ONE_STEP_FEW,
    ),
    "SanaSprintImg2ImgPipeline": Recipe(
        _SPRINT,
        _INSTRUCTION | _ONE_STEP_FEW,
    ),
    "LuminaPipeline": Recipe(_VAE, prepare=_fill_pad_token),
    "Lumina2Pipeline": Recipe(_VAE, {"system_prompt": "draw"}),
    "CogView3PlusPipeline": Recipe(),
    "CogView4Pipeline": Recipe(),
    "CogView4ControlPipeline": Recipe(
        {
            "transformer": partial(tiny, "CogView4Transformer2DModel", in_channels=8),
        }
    ),
    **dict.fromkeys(
        (
            "ZImagePipeline",
            "ZImageImg2ImgPipeline",
            "ZImageInpaintPipeline",
            "ZImageControlNetPipeline",
            "ZImageControlNetInpaintPipeline",
        ),
        Recipe(_QWEN3),
    ),
}
