"""Qwen-Image and Kandinsky 5, whose text encoder is a model of vision and language."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from tests.support.every_pipeline.parts.autoencoders import flow_vae_of
from tests.support.every_pipeline.parts.image_transformers import tiny
from tests.support.every_pipeline.parts.video_autoencoders import tiny_vae
from tests.support.every_pipeline.parts.vision_language import chat_tokenizer
from tests.support.every_pipeline.recipe import Recipe
from tests.support.tiny_models import SIDE_PX

__all__ = ["RECIPES"]

_qwen = partial(tiny, "QwenImageTransformer2DModel")
_WHOLE_PROMPT = {"max_sequence_length": 128}
_GUIDANCE = _WHOLE_PROMPT | {"guidance_scale": None}


def _draw_small(pipeline: Any) -> None:
    """Let Kandinsky 5 draw a small picture: it has a list of sizes, all of a million pixels."""
    pipeline.resolutions = [(SIDE_PX, SIDE_PX)]


RECIPES: Mapping[str, Recipe] = {
    **dict.fromkeys(
        (
            "QwenImagePipeline",
            "QwenImageImg2ImgPipeline",
            "QwenImageInpaintPipeline",
            "QwenImageControlNetPipeline",
        ),
        Recipe(call=_GUIDANCE),
    ),
    "QwenImageControlNetInpaintPipeline": Recipe(
        {"controlnet": partial(tiny, "QwenImageControlNetModel", extra_condition_channels=4)},
        _WHOLE_PROMPT,
    ),
    # It draws a million pixels at the least.
    **dict.fromkeys(
        (
            "QwenImageEditPipeline",
            "QwenImageEditInpaintPipeline",
            "QwenImageEditPlusPipeline",
        ),
        Recipe(call=_GUIDANCE),
    ),
    "QwenImageLayeredPipeline": Recipe(
        {"vae": partial(tiny_vae, "AutoencoderKLQwenImage", input_channels=4)},
        _GUIDANCE | {"layers": 1, "image": lambda inputs: inputs.picture().convert("RGBA")},
    ),
    "Kandinsky5T2IPipeline": Recipe(
        {"vae": partial(flow_vae_of, 16, 4)}, _WHOLE_PROMPT, prepare=_draw_small
    ),
    "Kandinsky5I2IPipeline": Recipe(
        {
            "vae": partial(flow_vae_of, 16, 4),
            "transformer": partial(tiny, "Kandinsky5Transformer3DModel", visual_cond=True),
        },
        _WHOLE_PROMPT,
        prepare=_draw_small,
    ),
    "Kandinsky5T2VPipeline": Recipe(
        {"vae": partial(tiny_vae, "AutoencoderKLHunyuanVideo", latent_channels=16)}, _WHOLE_PROMPT
    ),
    "Kandinsky5I2VPipeline": Recipe(
        {
            "vae": partial(tiny_vae, "AutoencoderKLHunyuanVideo", latent_channels=16),
            "transformer": partial(tiny, "Kandinsky5Transformer3DModel", visual_cond=True),
        },
        _WHOLE_PROMPT | {"num_frames": 9},
    ),
    "BriaFiboPipeline": Recipe(
        {"tokenizer": chat_tokenizer, "vae": partial(tiny_vae, "AutoencoderKLWan")}
    ),
}
