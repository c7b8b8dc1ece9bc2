"""Tiny UNets and what conditions them: ControlNets, adapters, motion modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffusers
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet

from tests.support.every_pipeline.parts.text import CLIP_WIDTH
from tests.support.tiny_models import SIDE_PX, UNET, unet

__all__ = [
    "PARTS",
    "XL",
    "controlnet",
    "motion_adapter",
    "pixel_unet",
    "prior",
    "unet",
    "unet_2d",
    "xl_unet",
]

_CONTROLNET_KEYS = UNET.keys() - {"sample_size", "up_block_types"}

XL: dict[str, Any] = {
    "cross_attention_dim": 2 * CLIP_WIDTH,
    "transformer_layers_per_block": (2, 1),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + CLIP_WIDTH,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
}
"""Settings of SDXL's UNet and ControlNets; with an aesthetic score it has five numbers, not six."""


def xl_unet(num_ids: int = 6, **changes: Any) -> diffusers.UNet2DConditionModel:
    settings = {
        **XL,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "projection_class_embeddings_input_dim": num_ids * 8 + CLIP_WIDTH,
    }
    return unet(**{**settings, **changes})


def controlnet(kind: type[Any] = diffusers.ControlNetModel, xl_ids: int = 0, **changes: Any) -> Any:
    settings = {key: UNET[key] for key in _CONTROLNET_KEYS}
    if xl_ids:
        settings.update(XL, projection_class_embeddings_input_dim=xl_ids * 8 + CLIP_WIDTH)
    settings.update(conditioning_embedding_out_channels=(4, 8), **changes)
    return kind(**settings)


def unet_2d(**changes: Any) -> diffusers.UNet2DModel:
    """A UNet without conditions."""
    settings = {
        "sample_size": SIDE_PX // 2,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(**{**settings, **changes})


def pixel_unet(in_channels: int = 3, text_width: int = 32, **changes: Any) -> Any:
    """DeepFloyd's UNet, which draws pixels and learns their variance."""
    settings = {
        "sample_size": SIDE_PX,
        "in_channels": in_channels,
        "out_channels": 6,
        "cross_attention_dim": 32,  # its norms have 32 groups
        "encoder_hid_dim": text_width,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "cross_attention_norm": "group_norm",
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "gelu",
    }
    return unet(**{**settings, **changes})


def motion_adapter(**changes: Any) -> diffusers.MotionAdapter:
    settings = {
        "block_out_channels": UNET["block_out_channels"],
        "motion_layers_per_block": 1,
        "motion_norm_num_groups": 4,
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 8,
    }
    return diffusers.MotionAdapter(**{**settings, **changes})


def prior(**changes: Any) -> diffusers.PriorTransformer:
    """The transformer that turns text into a picture's embedding (unCLIP, Kandinsky)."""
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "embedding_dim": CLIP_WIDTH,
        "num_layers": 1,
    }
    return diffusers.PriorTransformer(**{**settings, **changes})


def temporal_unet(kind: type[Any], **changes: Any) -> Any:
    """A UNet of videos, of the kinds that have three-dimensional blocks."""
    settings = {
        "sample_size": SIDE_PX // 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": CLIP_WIDTH,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    }
    return kind(**{**settings, **changes})


def stable_video_unet() -> diffusers.UNetSpatioTemporalConditionModel:
    return diffusers.UNetSpatioTemporalConditionModel(
        sample_size=SIDE_PX // 2,
        block_out_channels=(32, 32),  # its norms have 32 groups
        layers_per_block=1,
        cross_attention_dim=CLIP_WIDTH,
        num_attention_heads=2,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=3 * 8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )


PARTS: Mapping[str, Callable[[], Any]] = {
    "ControlNetModel": controlnet,
    "MotionAdapter": motion_adapter,
    "I2VGenXLUNet": partial(temporal_unet, I2VGenXLUNet),
    "PriorTransformer": prior,
    "UNet2DConditionModel": unet,
    "UNet2DModel": unet_2d,
    "UNet3DConditionModel": partial(temporal_unet, diffusers.UNet3DConditionModel),
    "UNetSpatioTemporalConditionModel": stable_video_unet,
}
