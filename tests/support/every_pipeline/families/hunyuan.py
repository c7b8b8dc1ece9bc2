"""HunyuanDiT, HunyuanImage and HunyuanVideo."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from diffusers import guiders

from tests.support.every_pipeline.parts.autoencoders import vae_of
from tests.support.every_pipeline.parts.image_transformers import tiny
from tests.support.every_pipeline.parts.language import decoder, siglip_processor, siglip_vision
from tests.support.every_pipeline.parts.video_autoencoders import tiny_vae
from tests.support.every_pipeline.parts.video_transformers import tiny_video
from tests.support.every_pipeline.parts.vision_language import chat_tokenizer
from tests.support.every_pipeline.recipe import Recipe
from tests.support.tiny_models import t5, t5_tokenizer

__all__ = ["RECIPES"]

_DIT = {"vae": partial(vae_of, 4), "text_encoder_2": t5, "tokenizer_2": t5_tokenizer}
_video = partial(tiny_video, "HunyuanVideoTransformer3DModel")
_TEMPLATE = {"prompt_template": {"template": "{}", "crop_start": 0}}
_LLAMA = {"tokenizer": chat_tokenizer, "text_encoder": partial(decoder, "LlamaModel")}
_VIDEO = _TEMPLATE | {
    "negative_prompt": "dog",  # of nothing at all it makes no finite numbers
    "true_cfg_scale": lambda inputs: inputs.pick(3.0, 1.0),
}


def _read_less(pipeline: Any) -> None:
    """Let HunyuanVideo 1.5 and HunyuanImage pad its prompts and pictures to fewer tokens."""
    pipeline.tokenizer_max_length = 32
    pipeline.tokenizer_2_max_length = 16
    pipeline.vision_num_semantic_tokens = 4


RECIPES: Mapping[str, Recipe] = {
    "HunyuanDiTPipeline": Recipe(_DIT),
    "HunyuanDiTPAGPipeline": Recipe(
        _DIT | {"pag_applied_layers": lambda: ["blocks.1"]}, {"pag_scale": 2.0}
    ),
    "HunyuanDiTControlNetPipeline": Recipe(
        _DIT, {"controlnet_conditioning_scale": lambda inputs: inputs.pick(0.5, 1.0)}
    ),
    "HunyuanImagePipeline": Recipe(
        {
            "guider": partial(
                guiders.AdaptiveProjectedMixGuidance, adaptive_projected_guidance_start_step=1
            ),
            "ocr_guider": guiders.AdaptiveProjectedMixGuidance,
        },
        {"negative_prompt": "dog"},
        prepare=_read_less,
    ),
    "HunyuanImageRefinerPipeline": Recipe(
        {
            "guider": guiders.AdaptiveProjectedMixGuidance,
            "vae": partial(tiny_vae, "AutoencoderKLHunyuanImageRefiner"),
            "transformer": partial(
                tiny,
                "HunyuanImageTransformer2DModel",
                in_channels=8,
                out_channels=4,
                text_embed_2_dim=None,
                patch_size=(1, 1, 1),
                rope_axes_dim=(2, 2, 4),
            ),
        }
    ),
    "HunyuanVideoPipeline": Recipe(_LLAMA, _VIDEO),
    "HunyuanSkyreelsImageToVideoPipeline": Recipe(
        _LLAMA | {"transformer": partial(_video, in_channels=8)}, _VIDEO
    ),
    "HunyuanVideoFramepackPipeline": Recipe(
        _LLAMA | {"image_encoder": siglip_vision, "feature_extractor": siglip_processor},
        _VIDEO | {"latent_window_size": 3},
    ),
    "HunyuanVideo15Pipeline": Recipe(
        {"guider": guiders.ClassifierFreeGuidance}, prepare=_read_less
    ),
    "HunyuanVideo15ImageToVideoPipeline": Recipe(
        {
            "guider": guiders.ClassifierFreeGuidance,
            "transformer": partial(tiny_video, "HunyuanVideo15Transformer3DModel", task_type="i2v"),
            "feature_extractor": siglip_processor,
        },
        prepare=_read_less,
    ),
}
