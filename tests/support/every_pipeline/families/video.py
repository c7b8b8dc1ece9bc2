"""Videos by transformers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from tests.support.every_pipeline.inputs import NUM_FRAMES
from tests.support.every_pipeline.parts.schedulers import PARTS
from tests.support.every_pipeline.parts.text import clip_image_processor, clip_vision
from tests.support.every_pipeline.parts.video_autoencoders import tiny_vae
from tests.support.every_pipeline.parts.video_transformers import tiny_video
from tests.support.every_pipeline.parts.vision_language import chat_tokenizer, qwen2_vl
from tests.support.every_pipeline.recipe import Recipe

__all__ = ["RECIPES"]

_wan = partial(tiny_video, "WanTransformer3DModel")
_WAN = {"transformer": _wan}
_cogvideo = partial(tiny_video, "CogVideoXTransformer3DModel")

_easy = partial(tiny_video, "EasyAnimateTransformer3DModel")
_EASY = {"text_encoder": qwen2_vl, "tokenizer": chat_tokenizer}

RECIPES: Mapping[str, Recipe] = {
    "WanPipeline": Recipe(_WAN),
    "WanVideoToVideoPipeline": Recipe(_WAN),
    "WanImageToVideoPipeline": Recipe(
        {
            "transformer": partial(_wan, in_channels=36, image_dim=16),
            "image_encoder": partial(clip_vision, projected=False),
            "image_processor": clip_image_processor,
        }
    ),
    "WanVACEPipeline": Recipe(
        {"transformer": partial(tiny_video, "WanVACETransformer3DModel")},
        {"video": None},
    ),
    "LucyEditPipeline": Recipe({"transformer": partial(_wan, in_channels=32)}),
    "ChronoEditPipeline": Recipe(
        {
            "transformer": partial(
                tiny_video, "ChronoEditTransformer3DModel", in_channels=36, image_dim=16
            )
        }
    ),
    "CogVideoXImageToVideoPipeline": Recipe({"transformer": partial(_cogvideo, in_channels=8)}),
    "CogVideoXFunControlPipeline": Recipe(
        {
            "transformer": partial(_cogvideo, in_channels=8),
            "scheduler": PARTS["CogVideoXDDIMScheduler"],
        },
        {"control_video": lambda inputs: inputs.video()},
    ),
    # It decodes by tiles only, and those are larger than these pictures.
    "AllegroPipeline": Recipe(call={"output_type": "latent"}),
    "EasyAnimatePipeline": Recipe(_EASY),
    "EasyAnimateInpaintPipeline": Recipe(
        {**_EASY, "transformer": partial(_easy, in_channels=4 + 4 + 1)},
        {"mask_video": lambda inputs: [inputs.mask() for _ in range(NUM_FRAMES)]},
    ),
    "EasyAnimateControlPipeline": Recipe(
        {**_EASY, "transformer": partial(_easy, in_channels=8)},
        {"control_video": lambda inputs: inputs.video()},
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": Recipe(
        call={"overlap_history": 1, "base_num_frames": 9, "num_frames": 9}
    ),
    "AnyFlowPipeline": Recipe(leave_out=frozenset({"video"})),
    "AnyFlowFARPipeline": Recipe(
        leave_out=frozenset({"video"}), alone="a cache of keys and values is among the arguments"
    ),
    "SkyReelsV2ImageToVideoPipeline": Recipe(
        {
            "transformer": partial(
                tiny_video, "SkyReelsV2Transformer3DModel", in_channels=36, image_dim=16
            ),
            "image_processor": clip_image_processor,
        }
    ),
    "LTXImageToVideoPipeline": Recipe(call={"num_frames": 9}),
    "LTXConditionPipeline": Recipe(call={"num_frames": 9}, leave_out=frozenset({"video"})),
    "LattePipeline": Recipe(call={"video_length": 2}),
    "SanaVideoPipeline": Recipe(
        {"vae": partial(tiny_vae, "AutoencoderKLWan")},
        {"frames": NUM_FRAMES, "complex_human_instruction": ["describe: "]},
    ),
    "SanaImageToVideoPipeline": Recipe(
        {"vae": partial(tiny_vae, "AutoencoderKLWan")},
        {"frames": NUM_FRAMES, "complex_human_instruction": ["describe: "]},
    ),
}
