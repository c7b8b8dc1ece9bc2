"""Flux and those who pack their latents as it does: Chroma, Bria, Ovis, LongCat."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from tests.support.every_pipeline.parts.autoencoders import flow_vae_of
from tests.support.every_pipeline.parts.image_transformers import tiny
from tests.support.every_pipeline.recipe import Recipe
from tests.support.tiny_models import flow_vae

__all__ = ["RECIPES"]

_VAE = {"vae": flow_vae}
_flux = partial(tiny, "FluxTransformer2DModel", out_channels=16)
_CONTROL = _VAE | {"transformer": partial(_flux, in_channels=32)}
_FILL = _VAE | {"transformer": partial(_flux, in_channels=16 + 16 + 16)}
_LONGCAT = {
    "vae": partial(flow_vae_of, 16),
    "transformer": partial(tiny, "LongCatImageTransformer2DModel", in_channels=64),
}
_SCALE = {"controlnet_conditioning_scale": lambda inputs: inputs.pick(0.5, 1.0)}
_SIZED = {"max_area": 32 * 32, "_auto_resize": False}

RECIPES: Mapping[str, Recipe] = {
    **dict.fromkeys(
        (
            "FluxPipeline",
            "FluxImg2ImgPipeline",
            "FluxInpaintPipeline",
            "ChromaPipeline",
            "ChromaImg2ImgPipeline",
            "ChromaInpaintPipeline",
            "BriaPipeline",
        ),
        Recipe(_VAE),
    ),
    "OvisImagePipeline": Recipe(_VAE, {"max_sequence_length": 256}),
    **dict.fromkeys(("FluxControlPipeline", "FluxControlImg2ImgPipeline"), Recipe(_CONTROL)),
    "FluxControlInpaintPipeline": Recipe(_CONTROL),
    "FluxFillPipeline": Recipe(_FILL),
    **dict.fromkeys(
        (
            "FluxControlNetPipeline",
            "FluxControlNetImg2ImgPipeline",
            "FluxControlNetInpaintPipeline",
        ),
        Recipe(_VAE, _SCALE),
    ),
    "FluxKontextPipeline": Recipe(_VAE, _SIZED),
    "FluxKontextInpaintPipeline": Recipe(_VAE, _SIZED),
    "LongCatImagePipeline": Recipe(_LONGCAT, {"enable_prompt_rewrite": False}),
    "LongCatImageEditPipeline": Recipe(_LONGCAT),
}
