"""Tiny autoencoders of pictures, videos and sound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers

from tests.support.tiny_models import vae

__all__ = ["PARTS", "flow_vae_of", "vae_of", "vq"]


def vq(**changes: Any) -> diffusers.VQModel:
    """The quantized autoencoder of the Kandinsky family ("movq")."""
    settings = {
        "block_out_channels": (32, 32),  # the spatial norm has 32 groups
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "latent_channels": 4,
        "num_vq_embeddings": 8,
        "vq_embed_dim": 4,
        "norm_num_groups": 4,
        "norm_type": "spatial",
    }
    return diffusers.VQModel(**{**settings, **changes})


def flow_vae_of(latent_channels: int, num_blocks: int = 2) -> diffusers.AutoencoderKL:
    """The autoencoder of the flow models, with this many channels and halvings less one."""
    return vae_of(
        num_blocks,
        latent_channels=latent_channels,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def vae_of(num_blocks: int, **changes: Any) -> diffusers.AutoencoderKL:
    """An autoencoder that halves the size once less than it has blocks."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * num_blocks,
        down_block_types=("DownEncoderBlock2D",) * num_blocks,
        up_block_types=("UpDecoderBlock2D",) * num_blocks,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.0,
        **changes,
    )


def temporal_decoder() -> diffusers.AutoencoderKLTemporalDecoder:
    """Stable Video Diffusion's."""
    return diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        layers_per_block=1,
        force_upcast=False,
    )


def deep_compression(**changes: Any) -> diffusers.AutoencoderDC:
    """Sana's."""
    settings = {
        "latent_channels": 4,
        "attention_head_dim": 4,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)),
        "upsample_block_type": "interpolate",
        "downsample_block_type": "conv",
    }
    return diffusers.AutoencoderDC(**{**settings, **changes})


PARTS: Mapping[str, Callable[[], Any]] = {
    "AutoencoderDC": deep_compression,
    "AutoencoderKL": vae,
    "AutoencoderKLTemporalDecoder": temporal_decoder,
    "VQModel": vq,
}
