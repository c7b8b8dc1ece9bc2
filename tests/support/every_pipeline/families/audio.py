"""Sound: AudioLDM, Stable Audio, Dance Diffusion and others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import diffusers
import transformers
from diffusers.pipelines.audioldm2.modeling_audioldm2 import (
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
)
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

from tests.support.every_pipeline.parts.language import roberta_tokenizer
from tests.support.every_pipeline.parts.text import T5_WIDTH
from tests.support.every_pipeline.parts.unets import unet
from tests.support.every_pipeline.recipe import Recipe
from tests.support.tiny_models import t5_tokenizer, vae

__all__ = ["RECIPES"]

_SAMPLE_RATE = 16000
_SECONDS = {"audio_length_in_s": lambda inputs: 0.002}
_CLAP_TEXT = {
    "vocab_size": len(roberta_tokenizer()),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 1,
    "projection_dim": 16,
}


def _clap() -> transformers.ClapModel:
    audio = {
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "patch_embeds_hidden_size": 8,
        "projection_dim": 16,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
    }
    config = transformers.ClapConfig(text_config=_CLAP_TEXT, audio_config=audio, projection_dim=16)
    return transformers.ClapModel(config)


def _clap_text() -> transformers.ClapTextModelWithProjection:
    return transformers.ClapTextModelWithProjection(transformers.ClapTextConfig(**_CLAP_TEXT))


def _vocoder() -> transformers.SpeechT5HifiGan:
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8,
        sampling_rate=_SAMPLE_RATE,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        normalize_before=False,
    )
    return transformers.SpeechT5HifiGan(config)


def _language_model() -> transformers.GPT2LMHeadModel:
    config = transformers.GPT2Config(
        n_embd=16,
        n_head=2,
        n_layer=1,
        vocab_size=64,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.config.max_new_tokens = 4
    return model


def _audioldm2_unet() -> Any:
    return AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((16, T5_WIDTH), (16, T5_WIDTH)),
    )


_OF_SOUND = {"vae": partial(vae, in_channels=1, out_channels=1), "vocoder": _vocoder}
_CLASSED = {
    "unet": partial(
        unet,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=16,
        class_embeddings_concat=True,
        cross_attention_dim=(8, 16),
    )
}
_STABLE_AUDIO = {
    "transformer": partial(
        diffusers.StableAudioDiTModel,
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=32,
        cross_attention_input_dim=16,
    ),
    "vae": partial(
        diffusers.AutoencoderOobleck,
        encoder_hidden_size=8,
        downsampling_ratios=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
        channel_multiples=[1, 2],
        sampling_rate=4,
    ),
    "projection_model": partial(
        StableAudioProjectionModel,
        text_encoder_dim=T5_WIDTH,
        conditioning_dim=16,
        min_value=0,
        max_value=32,
    ),
    # Its own scheduler, with a cosine, needs torchsde.
    "scheduler": partial(diffusers.EDMDPMSolverMultistepScheduler, sigma_schedule="exponential"),
}


def _dance_unet() -> diffusers.UNet1DModel:
    return diffusers.UNet1DModel(
        block_out_channels=(32, 32, 64),
        extra_in_channels=16,
        sample_size=512,
        sample_rate=_SAMPLE_RATE,
        in_channels=2,
        out_channels=2,
        flip_sin_to_cos=True,
        use_timestep_embedding=False,
        time_embedding_type="fourier",
        mid_block_type="UNetMidBlock1D",
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    )


RECIPES: Mapping[str, Recipe] = {
    "AudioLDMPipeline": Recipe(
        _OF_SOUND | _CLASSED | {"text_encoder": _clap_text, "tokenizer": roberta_tokenizer},
        _SECONDS,
    ),
    "MusicLDMPipeline": Recipe(
        _OF_SOUND
        | _CLASSED
        | {
            "text_encoder": _clap,
            "tokenizer": roberta_tokenizer,
            "feature_extractor": lambda: None,
        },
        _SECONDS,
    ),
    "AudioLDM2Pipeline": Recipe(
        _OF_SOUND
        | {
            "text_encoder": _clap,
            "tokenizer": roberta_tokenizer,
            "feature_extractor": lambda: None,
            "tokenizer_2": t5_tokenizer,
            "language_model": _language_model,
            "projection_model": partial(
                AudioLDM2ProjectionModel,
                text_encoder_dim=16,
                text_encoder_1_dim=T5_WIDTH,
                langauge_model_dim=16,
            ),
            "unet": _audioldm2_unet,
        },
        _SECONDS,
    ),
    "StableAudioPipeline": Recipe(_STABLE_AUDIO, {"audio_end_in_s": 2.0, "output_type": "pt"}),
    "DanceDiffusionPipeline": Recipe(
        {"unet": _dance_unet, "scheduler": diffusers.IPNDMScheduler},
        {"num_inference_steps": lambda inputs: inputs.pick(4, 5)},
    ),
}
