"""Pipelines of single papers, and of models that few use any more."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import diffusers
import transformers
from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from diffusers.pipelines.shap_e.renderer import ShapERenderer

from tests.support.every_pipeline.inputs import Inputs
from tests.support.every_pipeline.parts.autoencoders import vq
from tests.support.every_pipeline.parts.schedulers import ddim
from tests.support.every_pipeline.parts.text import (
    CLIP_WIDTH,
    clip_image_processor,
    clip_vision,
)
from tests.support.every_pipeline.parts.unets import prior, unet, unet_2d, xl_unet
from tests.support.every_pipeline.recipe import Recipe
from tests.support.tiny_models import SIDE_PX, UNET, clip_tokenizer, vae

__all__ = ["RECIPES"]

_CLIP_VOCABULARY = len(clip_tokenizer())

_MARIGOLD = {"unet": partial(unet, in_channels=8)}
_MARIGOLD_CALL = {"processing_resolution": 0, "match_input_resolution": True}


def _token_transformer() -> diffusers.UVit2DModel:
    return diffusers.UVit2DModel(
        hidden_size=16,
        cond_embed_dim=CLIP_WIDTH,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=CLIP_WIDTH,
        vocab_size=10,
        codebook_size=8,
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=2,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )


_AMUSED = {
    "transformer": _token_transformer,
    "vqvae": partial(
        vq, norm_type="group", lookup_from_codebook=True, latent_channels=8, vq_embed_dim=8
    ),
    "scheduler": partial(diffusers.AmusedScheduler, mask_token_id=9),
}


def _ldm_bert() -> LDMBertModel:
    return LDMBertModel(
        LDMBertConfig(
            vocab_size=_CLIP_VOCABULARY,
            d_model=16,
            encoder_layers=2,
            encoder_ffn_dim=32,
            encoder_attention_heads=2,
            head_dim=8,
        )
    )


def _example_encoder() -> PaintByExampleImageEncoder:
    config = transformers.CLIPVisionConfig(
        hidden_size=CLIP_WIDTH,
        intermediate_size=32,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=5,
        num_attention_heads=2,
        image_size=SIDE_PX,
        patch_size=SIDE_PX // 2,
    )
    return PaintByExampleImageEncoder(config, proj_size=CLIP_WIDTH)


def _shap_e_prior() -> diffusers.PriorTransformer:
    return prior(
        embedding_dim=16,
        num_embeddings=32,
        embedding_proj_dim=CLIP_WIDTH,
        time_embed_dim=64,
        clip_embed_dim=32,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
    )


_SHAP_E = {
    "prior": _shap_e_prior,
    "scheduler": partial(
        diffusers.HeunDiscreteScheduler,
        beta_schedule="exp",
        num_train_timesteps=1024,
        prediction_type="sample",
        use_karras_sigmas=True,
        clip_sample=True,
    ),
    "shap_e_renderer": partial(
        ShapERenderer,
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)),
        d_latent=16,
        d_hidden=8,
        n_output=12,
        background=(0.1, 0.1, 0.1),
    ),
}


def _unclip_decoder() -> Any:
    return unet(
        out_channels=6,
        in_channels=3,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )


def _super_resolution() -> Any:
    return unet_2d(
        sample_size=SIDE_PX,
        in_channels=6,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        resnet_time_scale_shift="scale_shift",
    )


_UNCLIP_SCHEDULER = partial(diffusers.UnCLIPScheduler, variance_type="learned_range")
_UNCLIP = {
    "decoder": _unclip_decoder,
    "text_proj": partial(
        UnCLIPTextProjModel,
        clip_embeddings_dim=CLIP_WIDTH,
        time_embed_dim=32,
        cross_attention_dim=CLIP_WIDTH,
    ),
    "super_res_first": _super_resolution,
    "super_res_last": _super_resolution,
    "decoder_scheduler": _UNCLIP_SCHEDULER,
    "super_res_scheduler": partial(diffusers.UnCLIPScheduler, variance_type="fixed_small_log"),
}
_UNCLIP_STEPS = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}


_XS = {
    "block_out_channels": (8, 16),
    "base_block_out_channels": UNET["block_out_channels"],
    "conditioning_embedding_out_channels": (4, 8),
    "num_attention_heads": 2,
    "sample_size": SIDE_PX // 2,
    "max_norm_num_groups": 4,
}

RECIPES: Mapping[str, Recipe] = {
    "MarigoldDepthPipeline": Recipe(_MARIGOLD, _MARIGOLD_CALL),
    "MarigoldNormalsPipeline": Recipe(_MARIGOLD, _MARIGOLD_CALL),
    "MarigoldIntrinsicsPipeline": Recipe(
        {
            "unet": partial(unet, in_channels=12, out_channels=8),
            "target_properties": lambda: {
                "target_names": ["albedo", "shading"],
                "albedo": {"prediction_space": "srgb"},
                "shading": {"prediction_space": "linear", "up_to_scale": True},
            },
        },
        _MARIGOLD_CALL,
    ),
    "AmusedPipeline": Recipe(_AMUSED),
    "AmusedImg2ImgPipeline": Recipe(_AMUSED),
    "AmusedInpaintPipeline": Recipe(_AMUSED),
    "LDMTextToImagePipeline": Recipe(
        {"bert": _ldm_bert, "tokenizer": clip_tokenizer, "unet": unet, "vqvae": vae}
    ),
    "LDMSuperResolutionPipeline": Recipe(
        {
            "unet": partial(unet_2d, in_channels=6, out_channels=3),
            "vqvae": partial(vq, norm_type="group", latent_channels=3, vq_embed_dim=3),
        }
    ),
    "PaintByExamplePipeline": Recipe(
        {
            "unet": partial(unet, in_channels=9),
            "image_encoder": _example_encoder,
            "feature_extractor": clip_image_processor,
        },
        {"example_image": Inputs.picture},
        frozenset({"negative_prompt"}),
    ),
    "ShapEPipeline": Recipe(_SHAP_E, {"frame_size": 8, "output_type": "latent"}),
    "ShapEImg2ImgPipeline": Recipe(_SHAP_E, {"frame_size": 8, "output_type": "latent"}),
    "UnCLIPPipeline": Recipe(
        _UNCLIP | {"prior": prior},
        _UNCLIP_STEPS | {"prior_num_inference_steps": lambda inputs: inputs.pick(2, 3)},
    ),
    "UnCLIPImageVariationPipeline": Recipe(
        _UNCLIP | {"feature_extractor": clip_image_processor}, _UNCLIP_STEPS
    ),
    "StableDiffusionGLIGENPipeline": Recipe(
        {"unet": partial(unet, attention_type="gated")},
        {"gligen_phrases": ["a hat"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.7]]},
    ),
    "StableDiffusionDiffEditPipeline": Recipe(
        call={
            "image_latents": lambda inputs: inputs.randn(1, 4, 16, 16),
            "mask_image": Inputs.mask,
        }
    ),
    "StableDiffusionModelEditingPipeline": Recipe({"scheduler": ddim, "with_augs": list}),
    "StableDiffusionParadigmsPipeline": Recipe(
        {"scheduler": diffusers.DDIMParallelScheduler}, {"parallel": 2}
    ),
    "StableDiffusionControlNetXSPipeline": Recipe(
        {
            "controlnet": partial(
                diffusers.ControlNetXSAdapter,
                **_XS,
                cross_attention_dim=CLIP_WIDTH,
                down_block_types=UNET["down_block_types"],
            )
        }
    ),
    "StableDiffusionXLControlNetXSPipeline": Recipe(
        {
            "unet": xl_unet,
            "controlnet": partial(
                diffusers.ControlNetXSAdapter,
                **_XS,
                cross_attention_dim=2 * CLIP_WIDTH,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                transformer_layers_per_block=(2, 1),
            ),
        }
    ),
    "VersatileDiffusionImageVariationPipeline": Recipe(
        {"image_feature_extractor": clip_image_processor, "image_encoder": clip_vision},
        leave_out=frozenset({"negative_prompt"}),
    ),
    "RePaintPipeline": Recipe(
        {"scheduler": diffusers.RePaintScheduler},
        {"num_inference_steps": 4, "jump_length": 2, "jump_n_sample": 2},
    ),
    "VisualClozePipeline": Recipe(not_built="its prompts are layouts of several pictures"),
    "VisualClozeGenerationPipeline": Recipe(
        not_built="its prompts are layouts of several pictures"
    ),
}
