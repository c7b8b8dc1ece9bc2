"""Tiny transformers that draw pictures, and their ControlNets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffusers

from tests.support.every_pipeline.parts.text import CLIP_WIDTH, T5_WIDTH
from tests.support.tiny_models import SIDE_PX

__all__ = ["PARTS", "tiny"]

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_WIDTH = 16  # of two heads of eight
_LATENT_PX = SIDE_PX // 2
_FLUX = {
    **_HEADS,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": T5_WIDTH,
    "axes_dims_rope": (2, 2, 4),
}
_SD3 = {
    **_HEADS,
    "sample_size": _LATENT_PX,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "joint_attention_dim": T5_WIDTH,
    "caption_projection_dim": _WIDTH,
    "pooled_projection_dim": 2 * CLIP_WIDTH,
    "pos_embed_max_size": _LATENT_PX,
}
_SANA = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": _WIDTH,
    "caption_channels": 16,
    "sample_size": _LATENT_PX,
}
_HUNYUAN = {
    **_HEADS,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": _LATENT_PX,
    "hidden_size": _WIDTH,
    "cross_attention_dim": CLIP_WIDTH,
    "cross_attention_dim_t5": T5_WIDTH,
    "pooled_projection_dim": 8,
    "text_len": 77,
    "text_len_t5": 256,
}
_Z_IMAGE = {
    "dim": _WIDTH,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
}
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "SD3Transformer2DModel": {**_SD3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
    "SD3ControlNetModel": {key: _SD3[key] for key in _SD3 if key != "out_channels"}
    | {"num_layers": 1},
    "FluxTransformer2DModel": {
        **_FLUX,
        "pooled_projection_dim": CLIP_WIDTH,
        "guidance_embeds": True,
    },
    "FluxControlNetModel": {
        **_FLUX,
        "pooled_projection_dim": CLIP_WIDTH,
        "guidance_embeds": True,
    },
    "ChromaTransformer2DModel": {
        **_FLUX,
        "approximator_num_channels": 64,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    },
    "BriaTransformer2DModel": _FLUX,
    "BriaFiboTransformer2DModel": {**_FLUX, "text_encoder_dim": 16},
    "OvisImageTransformer2DModel": {**_FLUX, "out_channels": 16, "joint_attention_dim": 16},
    "LongCatImageTransformer2DModel": {
        **_FLUX,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
    },
    "Flux2Transformer2DModel": {
        **_FLUX,
        "joint_attention_dim": 3 * 16,
        "axes_dims_rope": (2, 2, 2, 2),
        "timestep_guidance_channels": 16,
    },
    "PixArtTransformer2DModel": {
        **_HEADS,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": _WIDTH,
        "caption_channels": T5_WIDTH,
        "sample_size": _LATENT_PX,
        "use_additional_conditions": False,
    },
    "AuraFlowTransformer2DModel": {
        **_HEADS,
        "sample_size": _LATENT_PX,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "joint_attention_dim": T5_WIDTH,
        "caption_projection_dim": _WIDTH,
        "pos_embed_max_size": 64,
    },
    "HunyuanDiT2DModel": {**_HUNYUAN, "num_layers": 2},
    "HunyuanDiT2DControlNetModel": {**_HUNYUAN, "transformer_num_layers": 2},
    "SanaTransformer2DModel": _SANA,
    "SanaControlNetModel": {**_SANA, "num_layers": 1},
    "LuminaNextDiT2DModel": {
        "sample_size": _LATENT_PX,
        "hidden_size": 24,
        "num_layers": 2,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "cross_attention_dim": 16,
    },
    "Lumina2Transformer2DModel": {
        "sample_size": _LATENT_PX,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (128, 32, 32),
        "cap_feat_dim": 16,
    },
    "CogView3PlusTransformer2DModel": {
        **_HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "text_embed_dim": T5_WIDTH,
        "time_embed_dim": 8,
        "condition_dim": 2,
        "pos_embed_max_size": 8,
        "sample_size": 8,
    },
    "CogView4Transformer2DModel": {
        **_HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
        "condition_dim": 4,
        "rope_axes_dim": (8, 8),
    },
    "QwenImageTransformer2DModel": {
        **_HEADS,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (2, 2, 4),
    },
    "QwenImageControlNetModel": {
        **_HEADS,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 1,
        "joint_attention_dim": 16,
        "axes_dims_rope": (2, 2, 4),
    },
    "HunyuanImageTransformer2DModel": {
        **_HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 16,
        "text_embed_2_dim": T5_WIDTH,
        "rope_axes_dim": (4, 4),
    },
    "Kandinsky5Transformer3DModel": {
        "in_visual_dim": 16,
        "in_text_dim": 16,
        "in_text_dim2": CLIP_WIDTH,
        "time_dim": 16,
        "out_visual_dim": 16,
        "model_dim": 16,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 1,
        "axes_dims": (2, 2, 4),
    },
    "ZImageTransformer2DModel": {
        **_Z_IMAGE,
        "in_channels": 4,
        "n_layers": 2,
        "cap_feat_dim": 16,
        "axes_dims": [2, 2, 4],
        "axes_lens": [256, 32, 32],
    },
    "ZImageControlNetModel": {
        **_Z_IMAGE,
        "control_layers_places": [0],
        "control_refiner_layers_places": [0],
        "control_in_dim": 4,
    },
}


def tiny(name: str, **changes: Any) -> Any:
    """The tiny transformer of this class, with `changes` of its settings."""
    return getattr(diffusers, name)(**{**_SETTINGS[name], **changes})


PARTS: Mapping[str, Callable[[], Any]] = {name: partial(tiny, name) for name in _SETTINGS}
