"""Cosmos, whose safety checker finds everything safe here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import diffusers

from tests.support.every_pipeline.parts.video_autoencoders import tiny_vae
from tests.support.every_pipeline.parts.video_transformers import tiny_video
from tests.support.every_pipeline.parts.vision_language import chat_tokenizer
from tests.support.every_pipeline.recipe import Recipe

__all__ = ["RECIPES"]

_cosmos = partial(tiny_video, "CosmosTransformer3DModel")
_wan = partial(tiny_vae, "AutoencoderKLWan")
_FROM_PICTURE = frozenset({"video"})
_CONDITIONED = {"vae": _wan, "transformer": partial(_cosmos, in_channels=17, out_channels=16)}
_FLOW = partial(diffusers.FlowMatchEulerDiscreteScheduler, use_karras_sigmas=True)
_QWEN = {
    "tokenizer": chat_tokenizer,
    # It concatenates the hidden states of all layers.
    "transformer": partial(
        _cosmos,
        in_channels=17,
        out_channels=16,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=2 * 16,
        encoder_hidden_states_channels=32,
    ),
}

# Videos are compared as latents: the safety checker wants them in whole numbers of 255.
_LATENT = {"output_type": "latent"}

RECIPES: Mapping[str, Recipe] = {
    "CosmosTextToWorldPipeline": Recipe({"transformer": partial(_cosmos, in_channels=4)}, _LATENT),
    "CosmosVideoToWorldPipeline": Recipe(call=_LATENT | {"num_frames": 9}, leave_out=_FROM_PICTURE),
    "Cosmos2TextToImagePipeline": Recipe(
        _CONDITIONED
        | {"transformer": partial(_cosmos, in_channels=16, out_channels=16), "scheduler": _FLOW},
        _LATENT,
    ),
    "Cosmos2VideoToWorldPipeline": Recipe(
        _CONDITIONED | {"scheduler": _FLOW}, _LATENT, leave_out=_FROM_PICTURE
    ),
    "Cosmos2_5_PredictBasePipeline": Recipe(_QWEN, _LATENT, leave_out=_FROM_PICTURE),
}
