"""Stable Diffusion with ControlNets and T2I adapters, XL included."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import diffusers

from tests.support.every_pipeline.parts.unets import controlnet, unet, xl_unet
from tests.support.every_pipeline.recipe import Recipe
from tests.support.tiny_models import UNET, vae

__all__ = ["RECIPES"]


def _xl(num_ids: int = 6) -> dict:
    return {
        "unet": partial(xl_unet, num_ids),
        "vae": partial(vae, force_upcast=True),
        "controlnet": partial(controlnet, xl_ids=num_ids),
    }


def _union(num_ids: int = 6) -> dict:
    kind = diffusers.ControlNetUnionModel
    return _xl(num_ids) | {
        "controlnet": partial(
            controlnet,
            kind,
            xl_ids=num_ids,
            num_control_type=2,
            num_trans_channel=UNET["block_out_channels"][0],
            num_trans_head=2,
            num_proj_channel=UNET["block_out_channels"][0],
        )
    }


def _adapter(kind: str) -> diffusers.T2IAdapter:
    return diffusers.T2IAdapter(
        channels=list(UNET["block_out_channels"]),
        num_res_blocks=1,
        downscale_factor=4 if kind == "full_adapter_xl" else 2,
        adapter_type=kind,
    )


_SCALE = {"controlnet_conditioning_scale": lambda inputs: inputs.pick(0.5, 1.0)}
_MODE = _SCALE | {"control_mode": 0}

RECIPES: Mapping[str, Recipe] = {
    "StableDiffusionControlNetPipeline": Recipe(call=_SCALE),
    "StableDiffusionControlNetImg2ImgPipeline": Recipe(call=_SCALE),
    "StableDiffusionControlNetInpaintPipeline": Recipe(
        {"unet": partial(unet, in_channels=9)}, _SCALE
    ),
    "StableDiffusionControlNetPAGPipeline": Recipe(call=_SCALE),
    "StableDiffusionControlNetPAGInpaintPipeline": Recipe(
        {"unet": partial(unet, in_channels=9)}, _SCALE
    ),
    "StableDiffusionXLControlNetPipeline": Recipe(_xl(), _SCALE),
    "StableDiffusionXLControlNetImg2ImgPipeline": Recipe(_xl(), _SCALE),
    "StableDiffusionXLControlNetInpaintPipeline": Recipe(_xl(), _SCALE),
    "StableDiffusionXLControlNetPAGPipeline": Recipe(_xl(), _SCALE),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": Recipe(_xl(), _SCALE),
    "StableDiffusionXLControlNetUnionPipeline": Recipe(_union(), _MODE),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": Recipe(_union(), _MODE),
    "StableDiffusionXLControlNetUnionInpaintPipeline": Recipe(_union(), _MODE),
    "StableDiffusionAdapterPipeline": Recipe({"adapter": partial(_adapter, "full_adapter")}),
    "StableDiffusionXLAdapterPipeline": Recipe(
        {"unet": xl_unet, "adapter": partial(_adapter, "full_adapter_xl")}
    ),
}
