"""Pipelines with random weights in the exact shapes of published models, built on the device.

From configurations alone: nothing is downloaded. Calls get their text embeddings ready made, since
text encoders run once a request and the denoiser a hundred times.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["MODELS", "Model", "build", "call_arguments", "count_flops"]

_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True, slots=True)
class Model:
    """What a published model is made of, as far as its speed goes."""

    name: str
    size_px: int
    unet: dict[str, Any]
    vae: dict[str, Any] = field(default_factory=lambda: dict(_VAE))
    is_xl: bool = False
    scale: int = 8
    """Pixels a latent, by side."""

    @property
    def text_width(self) -> int:
        return int(self.unet["cross_attention_dim"])

    @property
    def latent_side(self) -> int:
        return self.size_px // self.scale

    @property
    def pooled_width(self) -> int:
        """Of the second text embedding: what the projection takes beside six numbers of size."""
        width = self.unet.get("projection_class_embeddings_input_dim", 0)
        return int(width) - 6 * int(self.unet.get("addition_time_embed_dim", 0))


SD_1_5 = Model(
    "SD 1.5",
    512,
    {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
)
SD_2_1 = Model(
    "SD 2.1",
    768,
    {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
)
SDXL = Model(
    "SDXL",
    1024,
    {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    # The published VAE overflows in float16, so the pipeline decodes in float32.
    {**_VAE, "force_upcast": True},
    is_xl=True,
)
_TINY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
_TINY_VAE = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
TINY = Model("tiny", 16, _TINY_UNET, _TINY_VAE, scale=2)
TINY_XL = Model(
    "tiny XL",
    16,
    {
        **_TINY_UNET,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 8,
    },
    {**_TINY_VAE, "force_upcast": True},
    is_xl=True,
    scale=2,
)

MODELS = {
    "sd15": SD_1_5,
    "sd21": SD_2_1,
    "sdxl": SDXL,
    "tiny": TINY,
    "tinyxl": TINY_XL,
}


def build(model: Model, device: torch.device, dtype: torch.dtype) -> Any:
    """A pipeline of these shapes on `device`."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**model.unet)
        vae = AutoencoderKL(**model.vae)
    parts: dict[str, Any] = {
        "unet": unet.to(dtype).eval(),
        "vae": vae.to(dtype).eval(),
        "text_encoder": None,
        "tokenizer": None,
    }
    if model.is_xl:
        parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
        scheduler = EulerDiscreteScheduler(**_SCHEDULE, steps_offset=1)
        pipeline: Any = StableDiffusionXLPipeline(**parts, scheduler=scheduler)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None}
        scheduler = DDIMScheduler(**_SCHEDULE, clip_sample=False, steps_offset=1)
        pipeline = StableDiffusionPipeline(
            **parts, scheduler=scheduler, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_arguments(
    model: Model, pipeline: Any, *, num_steps: int, seed: int, num_tokens: int = 77
) -> dict[str, Any]:
    """The arguments of one guided call, its embeddings and its noise drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        return values.to(pipeline.unet.device, pipeline.unet.dtype)

    arguments: dict[str, Any] = {
        "prompt_embeds": draw(1, num_tokens, model.text_width),
        "negative_prompt_embeds": draw(1, num_tokens, model.text_width),
        "num_inference_steps": num_steps,
        "guidance_scale": 7.5,
        "height": model.size_px,
        "width": model.size_px,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
    }
    if model.is_xl:
        arguments["pooled_prompt_embeds"] = draw(1, model.pooled_width)
        arguments["negative_pooled_prompt_embeds"] = draw(1, model.pooled_width)
    return arguments


def count_flops(model: Model, num_tokens: int = 77) -> tuple[int, int]:
    """Floating-point operations of the UNet for one row and of one decoded picture, by shapes.

    A multiplication and its addition are two.
    """
    meta = torch.device("meta")
    with meta, torch.no_grad():
        unet, vae = UNet2DConditionModel(**model.unet), AutoencoderKL(**model.vae)
        sample = torch.empty(1, 4, model.latent_side, model.latent_side)
        text = torch.empty(1, num_tokens, model.text_width)
        added = None
        if model.is_xl:
            added = {
                "text_embeds": torch.empty(1, model.pooled_width),
                "time_ids": torch.empty(1, 6),
            }
        with FlopCounterMode(display=False) as denoising:
            unet(sample, torch.empty(1), text, added_cond_kwargs=added)
        with FlopCounterMode(display=False) as decoding:
            vae.decode(sample)
    return denoising.get_total_flops(), decoding.get_total_flops()
