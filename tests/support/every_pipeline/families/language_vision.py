"""Newer pictures by transformers, most with a model of vision and language as text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import diffusers
import transformers

from tests.support.every_pipeline.inputs import Inputs
from tests.support.every_pipeline.parts.language import decoder, llama_tokenizer
from tests.support.every_pipeline.parts.schedulers import flow_euler
from tests.support.every_pipeline.parts.vision_language import chat_tokenizer
from tests.support.every_pipeline.recipe import Recipe
from tests.support.tiny_models import SIDE_PX, flow_vae, gemma_tokenizer, qwen3

__all__ = ["RECIPES"]

_KLEIN = {"text_encoder": partial(decoder, "Qwen3ForCausalLM")}
_REFERENCE = {"image": lambda inputs: inputs.picture(64)}
_WHOLE_PROMPT = {"max_sequence_length": 1024}
_LAYERS = {"text_encoder_out_layers": (0, 1, 2)}


def _t5_gemma() -> Any:
    settings = {
        "vocab_size": len(gemma_tokenizer()),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "layer_types": ["full_attention"],
    }
    module = transformers.models.t5gemma.configuration_t5gemma.T5GemmaModuleConfig(**settings)
    config = transformers.T5GemmaConfig(encoder=module, is_encoder_decoder=False, **settings)
    return transformers.models.t5gemma.modeling_t5gemma.T5GemmaEncoder(config.encoder)


_prx = partial(
    diffusers.PRXTransformer2DModel,
    in_channels=4,
    context_in_dim=16,
    hidden_size=16,
    mlp_ratio=2.0,
    num_heads=2,
    depth=2,
    axes_dim=[4, 4],
)
_omnigen = partial(
    diffusers.OmniGenTransformer2DModel,
    hidden_size=16,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=32,
    num_layers=2,
    time_step_dim=8,
    vocab_size=128,
    pad_token_id=0,
    rope_scaling={"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]},
)
_hidream = partial(
    diffusers.HiDreamImageTransformer2DModel,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    caption_channels=[32, 16],
    text_emb_dim=32,
    axes_dims_rope=(4, 2, 2),
    max_resolution=(32, 32),
    llama_layers=(0, 1),
)
_JOY: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 1,
    "rope_dim_list": [2, 2, 4],
}
_joy = partial(diffusers.JoyImageEditTransformer3DModel, **_JOY)
_krea = partial(
    diffusers.Krea2Transformer2DModel,
    in_channels=64,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=32,
    timestep_embed_dim=8,
    text_hidden_dim=16,
    num_text_layers=3,
    text_num_attention_heads=2,
    text_num_key_value_heads=1,
    text_intermediate_size=16,
    num_layerwise_text_blocks=1,
    num_refiner_text_blocks=1,
    axes_dims_rope=(4, 2, 2),
)
_nucleus = partial(
    diffusers.NucleusMoEImageTransformer2DModel,
    in_channels=64,
    out_channels=16,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=16,
    axes_dims_rope=(8, 4, 4),
    moe_enabled=False,
    capacity_factors=[8.0, 8.0],
)
_ernie = partial(
    diffusers.ErnieImageTransformer2DModel,
    hidden_size=16,
    num_attention_heads=2,
    num_layers=2,
    ffn_hidden_size=32,
    in_channels=16,
    out_channels=16,
    text_in_dim=16,
    rope_axes_dim=(4, 2, 2),
)


def _draw_small_bucket(pipeline: Any) -> None:
    """Let JoyImage edit a small picture: its table of sizes has only large ones."""
    processor = getattr(pipeline, "vae_image_processor", None) or pipeline.image_processor
    processor.get_default_height_width = lambda *sizes: (SIDE_PX, SIDE_PX)


def _edit(inputs: Inputs) -> str:
    return f'{{"edit_instruction": "{inputs.pick("a hat", "a cat", "fog", "sea")}"}}'


def _draw_small(pipeline: Any) -> None:
    """Let HiDream draw pictures of the usual size: it scales them to its own area."""
    pipeline.default_sample_size = 16


RECIPES: Mapping[str, Recipe] = {
    "Flux2KleinPipeline": Recipe(_KLEIN, _LAYERS | _REFERENCE),
    "Flux2KleinInpaintPipeline": Recipe(_KLEIN, _LAYERS),
    "Flux2KleinKVPipeline": Recipe(_KLEIN, _LAYERS | _REFERENCE),
    "BriaFiboEditPipeline": Recipe(
        {"tokenizer": chat_tokenizer}, {"prompt": _edit, "_auto_resize": False}
    ),
    "PRXPipeline": Recipe(
        {
            "transformer": _prx,
            "text_encoder": _t5_gemma,
            "tokenizer": gemma_tokenizer,
            "vae": flow_vae,
        }
    ),
    "PRXPixelPipeline": Recipe(
        {
            "transformer": partial(_prx, in_channels=3, patch_size=4),
            "text_encoder": qwen3,
            "tokenizer": chat_tokenizer,
        }
    ),
    "OmniGenPipeline": Recipe(
        {
            "transformer": _omnigen,
            "tokenizer": llama_tokenizer,
            "scheduler": partial(
                diffusers.FlowMatchEulerDiscreteScheduler, invert_sigmas=True, num_train_timesteps=1
            ),
        },
        {"input_images": None},
    ),
    "HiDreamImagePipeline": Recipe(
        {
            "transformer": _hidream,
            "vae": flow_vae,
            "tokenizer_4": llama_tokenizer,
            "text_encoder_4": partial(decoder, "LlamaForCausalLM"),
        },
        prepare=_draw_small,
    ),
    "Krea2Pipeline": Recipe(
        {
            "tokenizer": chat_tokenizer,
            "transformer": _krea,
            "scheduler": partial(flow_euler, use_dynamic_shifting=True),
            "text_encoder_select_layers": lambda: (0, 1, 2),
        },
        _WHOLE_PROMPT,
    ),
    "NucleusMoEImagePipeline": Recipe(
        {"transformer": _nucleus}, {"return_index": -1} | _WHOLE_PROMPT
    ),
    "ErnieImagePipeline": Recipe(
        {
            "transformer": _ernie,
            "text_encoder": partial(decoder, "MistralModel"),
            "tokenizer": chat_tokenizer,
        },
        {"use_pe": False},
    ),
    "JoyImageEditPlusPipeline": Recipe(
        {"transformer": partial(diffusers.JoyImageEditPlusTransformer3DModel, **_JOY)},
        {"images": lambda inputs: [inputs.picture()]},
        alone="a plain list has an entry for each row",
        prepare=_draw_small_bucket,
    ),
    "JoyImageEditPipeline": Recipe(
        {"transformer": _joy}, _WHOLE_PROMPT, prepare=_draw_small_bucket
    ),
}
