"""LTX-2: video and sound together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import transformers
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from tests.support.every_pipeline.parts.language import gemma_vocabulary
from tests.support.every_pipeline.parts.vision_language import DECODER
from tests.support.every_pipeline.recipe import Recipe

__all__ = ["RECIPES"]

_WIDTH = DECODER["hidden_size"]


def _gemma3() -> transformers.Gemma3ForConditionalGeneration:
    config = transformers.Gemma3Config(
        text_config={**DECODER, **gemma_vocabulary()},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _transformer() -> diffusers.LTX2VideoTransformer3DModel:
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=_WIDTH,
        rope_double_precision=False,
        rope_type="split",
    )


def _connectors() -> LTX2TextConnectors:
    return LTX2TextConnectors(
        caption_channels=_WIDTH,
        text_proj_in_factor=DECODER["num_hidden_layers"] + 1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )


def _vae() -> diffusers.AutoencoderKLLTX2Video:
    autoencoder = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        decoder_causal=False,
    )
    autoencoder.use_framewise_encoding = False
    autoencoder.use_framewise_decoding = False
    return autoencoder


def _audio_vae() -> diffusers.AutoencoderKLLTX2Audio:
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )


def _vocoder() -> LTX2Vocoder:
    return LTX2Vocoder(
        in_channels=2 * 8,
        hidden_channels=16,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
        output_sampling_rate=16000,
    )


_PARTS: Mapping[str, Any] = {
    "text_encoder": _gemma3,
    "transformer": _transformer,
    "connectors": _connectors,
    "vae": _vae,
    "audio_vae": _audio_vae,
    "vocoder": _vocoder,
}
_PLAIN = {
    "num_frames": 3,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "spatio_temporal_guidance_blocks": None,
}

RECIPES: Mapping[str, Recipe] = {
    "LTX2Pipeline": Recipe(_PARTS, _PLAIN),
    "LTX2ImageToVideoPipeline": Recipe(_PARTS, _PLAIN | {"image_crf": 0}),
    "LTX2ConditionPipeline": Recipe(_PARTS, _PLAIN),
    "LTX2InContextPipeline": Recipe(_PARTS, _PLAIN),
    "LTX2HDRPipeline": Recipe(_PARTS, {"num_frames": 3}),
    "LTX2DFRPipeline": Recipe(_PARTS, {"num_frames": 3}),
}
