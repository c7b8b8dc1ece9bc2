"""Videos by UNets: AnimateDiff, Stable Video Diffusion, I2VGen-XL, Text2Video-Zero."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import diffusers

from tests.support.every_pipeline.parts.text import clip_image_processor, clip_vision
from tests.support.every_pipeline.parts.unets import motion_adapter, xl_unet
from tests.support.every_pipeline.recipe import Recipe
from tests.support.tiny_models import UNET

__all__ = ["RECIPES"]

_ZERO = {"video_length": 2, "t0": 0, "t1": 1}
_FRAMES = {"num_frames": 2, "decode_chunk_size": 2}


def _sparse_controlnet() -> diffusers.SparseControlNetModel:
    return diffusers.SparseControlNetModel(
        block_out_channels=UNET["block_out_channels"],
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=UNET["cross_attention_dim"],
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        conditioning_embedding_out_channels=(4, 8),
        motion_num_attention_heads=2,
    )


RECIPES: Mapping[str, Recipe] = {
    "AnimateDiffPipeline": Recipe(call=_FRAMES),
    "AnimateDiffPAGPipeline": Recipe(call=_FRAMES),
    "AnimateDiffControlNetPipeline": Recipe(
        call=_FRAMES | {"conditioning_frames": lambda inputs: inputs.video(2)}
    ),
    "AnimateDiffSDXLPipeline": Recipe(
        {"unet": xl_unet, "motion_adapter": partial(motion_adapter, use_motion_mid_block=False)},
        {"num_frames": 2},
    ),
    "AnimateDiffSparseControlNetPipeline": Recipe(
        {"controlnet": _sparse_controlnet},
        {"num_frames": 2, "conditioning_frames": lambda inputs: inputs.picture()},
    ),
    "AnimateDiffVideoToVideoPipeline": Recipe(call={"video": lambda inputs: inputs.video(2)}),
    "AnimateDiffVideoToVideoControlNetPipeline": Recipe(
        call={
            "video": lambda inputs: inputs.video(2),
            "conditioning_frames": lambda inputs: inputs.video(2),
        }
    ),
    "PIAPipeline": Recipe(
        {"motion_adapter": partial(motion_adapter, conv_in_channels=9)}, {"num_frames": 2}
    ),
    "StableVideoDiffusionPipeline": Recipe(
        {
            "feature_extractor": clip_image_processor,
            "image_encoder": partial(clip_vision, image_size=224, patch_size=112),
        },
        {
            "num_frames": 2,
            "min_guidance_scale": 1.0,
            "max_guidance_scale": lambda inputs: inputs.pick(3.0, 5.0, 1.0),
        },
    ),
    "I2VGenXLPipeline": Recipe(
        {"feature_extractor": clip_image_processor},
        # Its own way of skipping a layer does not run with transformers 5.
        {"num_frames": 2, "clip_skip": None},
    ),
    "TextToVideoSDPipeline": Recipe(call={"num_frames": 2}),
    "VideoToVideoSDPipeline": Recipe(call={"video": lambda inputs: inputs.video(2)}),
    "TextToVideoZeroPipeline": Recipe(
        # Without guidance it fails, alone too.
        call=_ZERO | {"guidance_scale": lambda inputs: inputs.pick(3.0, 5.0)}
    ),
    "TextToVideoZeroSDXLPipeline": Recipe({"unet": xl_unet}, _ZERO),
}
