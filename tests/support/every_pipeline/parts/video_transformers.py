"""Tiny transformers that draw videos, and their ControlNets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffusers

from tests.support.every_pipeline.parts.text import CLIP_WIDTH, T5_WIDTH

__all__ = ["PARTS", "tiny_video"]

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_WIDTH = 16
_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,  # three axes of positions, each an even number
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": T5_WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
_COGVIDEO = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": T5_WIDTH,
    "num_layers": 2,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 5,
    "max_text_seq_length": 32,
}
_HUNYUAN = {
    **_HEADS,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "rope_axes_dim": (2, 2, 4),
}
_HUNYUAN_VIDEO = {
    **_HUNYUAN,
    "in_channels": 4,
    "out_channels": 4,
    "text_embed_dim": 16,
    "pooled_projection_dim": CLIP_WIDTH,
}
_COSMOS = {
    "in_channels": 4 + 1,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": T5_WIDTH,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "concat_padding_mask": False,  # to do it takes torchvision
    "extra_pos_embed_type": None,
}
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": {**_WAN, "vace_layers": [0, 1], "vace_in_channels": 96},
    "SkyReelsV2Transformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "AnyFlowTransformer3DModel": _WAN,
    "AnyFlowFARTransformer3DModel": {**_WAN, "chunk_partition": (1, 1)},
    "CogVideoXTransformer3DModel": _COGVIDEO,
    "ConsisIDTransformer3DModel": {
        **_COGVIDEO,
        "cross_attn_interval": 1,
        "cross_attn_dim_head": 8,
        "cross_attn_num_heads": 2,
    },
    "AllegroTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "num_layers": 2,
        "cross_attention_dim": 48,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 2,
        "caption_channels": T5_WIDTH,
    },
    "LatteTransformer3DModel": {
        **_HEADS,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "cross_attention_dim": _WIDTH,
        "attention_bias": True,
        "sample_size": 16,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": T5_WIDTH,
        "video_length": 2,
    },
    "MochiTransformer3DModel": {
        **_HEADS,
        "num_layers": 2,
        "pooled_projection_dim": 16,
        "text_embed_dim": T5_WIDTH,
        "time_embed_dim": 4,
        "max_sequence_length": 32,
    },
    "LTXVideoTransformer3DModel": {
        **_HEADS,
        "in_channels": 8,
        "out_channels": 8,
        "cross_attention_dim": _WIDTH,
        "num_layers": 2,
        "caption_channels": T5_WIDTH,
    },
    "EasyAnimateTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "num_layers": 2,
        "mmdit_layers": 1,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
    },
    "CosmosTransformer3DModel": _COSMOS,
    "HunyuanVideoTransformer3DModel": _HUNYUAN_VIDEO,
    "HunyuanVideoFramepackTransformer3DModel": {
        **_HUNYUAN_VIDEO,
        "has_image_proj": True,
        "image_proj_dim": 16,
        "has_clean_x_embedder": True,
    },
    "HunyuanVideo15Transformer3DModel": {
        **_HEADS,
        "in_channels": 9,
        "out_channels": 4,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 16,
        "text_embed_2_dim": T5_WIDTH,
        "image_embed_dim": 16,
        "rope_axes_dim": (2, 2, 4),
        "target_size": 32,
        "task_type": "t2v",
    },
    "SanaVideoTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 16,
        "sample_size": 4,
        "rope_max_seq_len": 32,
    },
    "MotifVideoTransformer3DModel": {**_HUNYUAN, "text_embed_dim": 16},
}


def tiny_video(name: str, **changes: Any) -> Any:
    """The tiny transformer of this class, with `changes` of its settings."""
    return getattr(diffusers, name)(**{**_SETTINGS[name], **changes})


PARTS: Mapping[str, Callable[[], Any]] = {name: partial(tiny_video, name) for name in _SETTINGS}
