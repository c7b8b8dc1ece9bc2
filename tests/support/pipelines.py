"""Tiny random-weight diffusers pipelines, one a family.

Built from configurations alone: no hub, no download, no file. The weights are seeded, so a family
is the same every time it is built. A pipeline is mutable (scheduler, adapters, replaced forwards):
`build` makes a fresh one, which costs about 30 ms; only tests that never change it use `shared`.

    pipeline = build("flux")
    images = pipeline(**example_kwargs("flux", 0)).images       # (1, H, W, 3) float in [0, 1]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

from tests.support import transformer_pipelines
from tests.support.tiny_models import (
    MAX_TOKENS,
    SIDE_PX,
    UNET,
    clip,
    clip_tokenizer,
    make_every_parameter_count,
    unet,
    vae,
    vision_encoder,
)


def build(family: str) -> DiffusionPipeline:
    """Build a fresh pipeline of `family`: float32, CPU, eval mode, no progress bar."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = {**FAMILIES, **VARIANTS}[family]()
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                make_every_parameter_count(module)
                module.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@functools.cache
def shared(family: str) -> DiffusionPipeline:
    """The family's pipeline for tests that only call it, and never change it."""
    return build(family)


def overflowing(pipeline: Any) -> Any:
    """`pipeline`, whose VAE from now on multiplies more than float32 holds."""
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight.mul_(1e30)
        pipeline.vae.decoder.conv_out.weight.mul_(1e30)
    return pipeline


def with_safety_checker(*, is_strict: bool) -> DiffusionPipeline:
    """Stable Diffusion with a safety checker that flags everything, or nothing."""
    checker = StableDiffusionSafetyChecker(
        transformers.CLIPConfig(
            text_config={**_SMALL_CLIP, "vocab_size": 100},
            vision_config={**_SMALL_CLIP, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    ).eval()
    with torch.no_grad():
        for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
            weights.fill_(-10.0 if is_strict else 10.0)
    extractor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    pipeline = build("stable_diffusion")
    checked = {"safety_checker": checker, "feature_extractor": extractor}
    checked_pipeline = diffusers.StableDiffusionPipeline(**{**pipeline.components, **checked})
    checked_pipeline.set_progress_bar_config(disable=True)
    return checked_pipeline


_SMALL_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def _beta_schedule(**changes: Any) -> dict[str, Any]:
    """The noise schedule that the Stable Diffusion checkpoints carry."""
    return dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **changes)


def _stable_diffusion(
    pipeline_type: type[DiffusionPipeline] = diffusers.StableDiffusionPipeline,
    unet_changes: dict[str, Any] | None = None,
    **components: Any,
) -> DiffusionPipeline:
    """Any pipeline with Stable Diffusion 1's components; `components` adds to them or replaces."""
    return pipeline_type(
        **{
            "vae": vae(),
            "text_encoder": clip(),
            "tokenizer": clip_tokenizer(),
            "unet": unet(**(unet_changes or {})),
            "scheduler": diffusers.DDIMScheduler(
                **_beta_schedule(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
            ),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
            **components,
        }
    )


def _stable_diffusion_v() -> DiffusionPipeline:
    schedule = _beta_schedule(prediction_type="v_prediction", steps_offset=1)
    return _stable_diffusion(
        unet_changes={"use_linear_projection": True, "upcast_attention": True},
        scheduler=diffusers.DPMSolverMultistepScheduler(**schedule),
    )


def _controlnet() -> DiffusionPipeline:
    keys = UNET.keys() - {"sample_size", "up_block_types"}
    controlnet = diffusers.ControlNetModel(
        **{key: UNET[key] for key in keys}, conditioning_embedding_out_channels=(4, 8)
    )
    return _stable_diffusion(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet)


def _latent_consistency() -> DiffusionPipeline:
    return _stable_diffusion(
        diffusers.LatentConsistencyModelPipeline,
        unet_changes={"time_cond_proj_dim": 8},
        scheduler=diffusers.LCMScheduler(**_beta_schedule(set_alpha_to_one=False)),
    )


def _stable_diffusion_xl() -> DiffusionPipeline:
    denoiser = unet(
        cross_attention_dim=32,
        transformer_layers_per_block=(2, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(force_upcast=True),
        text_encoder=clip(),
        text_encoder_2=clip(projected=True, act="gelu"),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=denoiser,
        scheduler=diffusers.EulerDiscreteScheduler(**_beta_schedule(steps_offset=1)),
        add_watermarker=False,
    )


def _kandinsky_2_2() -> DiffusionPipeline:
    denoiser = unet(
        out_channels=8,  # mean and variance
        cross_attention_dim=16,
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )
    movq = diffusers.VQModel(
        block_out_channels=(32, 32),  # the spatial norm has 32 groups
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        num_vq_embeddings=8,
        vq_embed_dim=4,
        norm_num_groups=4,
        norm_type="spatial",
    )
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=True)
    return diffusers.KandinskyV22Pipeline(unet=denoiser, movq=movq, scheduler=scheduler)


def _kandinsky_2_2_combined() -> DiffusionPipeline:
    """Two pipelines in one: it calls the prior's ``__call__``, then the decoder's."""
    prior = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=16,
        num_layers=1,
        additional_embeddings=4,
    )
    return diffusers.KandinskyV22CombinedPipeline(
        **_kandinsky_2_2().components,
        prior_prior=prior,
        prior_image_encoder=vision_encoder(),
        prior_text_encoder=clip(projected=True, act="gelu"),
        prior_tokenizer=clip_tokenizer(),
        prior_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        prior_image_processor=transformers.CLIPImageProcessorPil(crop_size=SIDE_PX, size=SIDE_PX),
    )


def _stable_cascade_prior() -> DiffusionPipeline:
    prior = diffusers.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(1, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_in_channels=16,
        clip_text_pooled_in_channels=16,
        clip_image_in_channels=16,
        clip_seq=2,
        switch_level=[False],
        dropout=(0.0, 0.0),
    )
    return diffusers.StableCascadePriorPipeline(
        tokenizer=clip_tokenizer(),
        text_encoder=clip(projected=True, act="gelu"),
        prior=prior,
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        resolution_multiple=4.0,
    )


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "stable_diffusion": _stable_diffusion,
    "stable_diffusion_v": _stable_diffusion_v,
    "stable_diffusion_xl": _stable_diffusion_xl,
    "stable_diffusion_3": transformer_pipelines.stable_diffusion_3,
    "flux": transformer_pipelines.flux,
    "pixart_sigma": transformer_pipelines.pixart_sigma,
    "sana": transformer_pipelines.sana,
    "stable_diffusion_controlnet": _controlnet,
    "stable_diffusion_img2img": functools.partial(
        _stable_diffusion, diffusers.StableDiffusionImg2ImgPipeline
    ),
    "stable_diffusion_inpaint": functools.partial(
        _stable_diffusion,
        diffusers.StableDiffusionInpaintPipeline,
        unet_changes={"in_channels": 9},
    ),
    "stable_diffusion_pag": functools.partial(
        _stable_diffusion, diffusers.StableDiffusionPAGPipeline
    ),
    "latent_consistency": _latent_consistency,
    "kandinsky_2_2": _kandinsky_2_2,
    "kandinsky_2_2_combined": _kandinsky_2_2_combined,
    "stable_cascade_prior": _stable_cascade_prior,
    "z_image": transformer_pipelines.z_image,
}

# Of a family above, where a test needs them otherwise.
VARIANTS: dict[str, Callable[[], DiffusionPipeline]] = {
    "stable_diffusion_3_16": functools.partial(transformer_pipelines.stable_diffusion_3, 16),
}

PROMPTS = ("a red boat", "two cats, one hat", "fog", "a tiny blue house by the sea", "sand")
STEPS = (4, 7, 3, 6, 5)
GUIDANCE = (7.5, 1.0, 4.0, 1.0, 2.5)  # one: no classifier-free guidance where the family has it

# Arguments that a family's calls need beside the common ones, at this size.
_EXTRA_KWARGS: dict[str, dict[str, Any]] = {
    "stable_diffusion_3": {"max_sequence_length": MAX_TOKENS},
    "flux": {"max_sequence_length": MAX_TOKENS},
    "z_image": {"max_sequence_length": MAX_TOKENS},
    "pixart_sigma": {
        "max_sequence_length": MAX_TOKENS,
        "use_resolution_binning": False,
        "clean_caption": False,
    },
    "sana": {
        "max_sequence_length": MAX_TOKENS,
        "use_resolution_binning": False,
        "complex_human_instruction": ["describe: "],
    },
}


def example_kwargs(family: str, index: int) -> dict[str, Any]:
    """Arguments of example call `index`, with a fresh generator and fresh tensors.

    Examples differ in prompt, steps, guidance (every other one off) and seed; they agree in size.
    """
    kind = index % len(STEPS)
    kwargs: dict[str, Any] = dict(
        prompt=PROMPTS[kind],
        num_inference_steps=STEPS[kind],
        guidance_scale=GUIDANCE[kind],
        height=SIDE_PX,
        width=SIDE_PX,
        generator=torch.Generator().manual_seed(1000 + index),
        output_type="np",
        **_EXTRA_KWARGS.get(family, {}),
    )
    inputs = torch.Generator().manual_seed(2000 + index)
    image = torch.rand((1, 3, SIDE_PX, SIDE_PX), generator=inputs)
    if family == "kandinsky_2_2_combined":
        kwargs.update(prior_num_inference_steps=2 + kind % 2)
    elif family == "flux" and kind == 2:
        kwargs.update(true_cfg_scale=3.0, negative_prompt="dog")  # a second forward a step
    elif family == "z_image" and kwargs["guidance_scale"] == 1.0:
        kwargs.update(guidance_scale=0.0)  # its scale counts from zero
    elif family == "stable_diffusion_controlnet":
        kwargs.update(image=image, controlnet_conditioning_scale=0.5 + 0.25 * (kind % 2))
    elif family == "stable_diffusion_img2img":
        del kwargs["height"], kwargs["width"]
        kwargs.update(image=image, strength=0.8)
    elif family == "stable_diffusion_inpaint":
        mask = torch.rand((1, 1, SIDE_PX, SIDE_PX), generator=inputs)
        kwargs.update(image=image, mask_image=mask.round(), strength=1.0 - 0.1 * (kind % 2))
    elif family == "stable_diffusion_pag":
        kwargs.update(pag_scale=0.0 if kind == 2 else 2.0)
    elif family == "kandinsky_2_2":
        del kwargs["prompt"]
        kwargs.update(
            image_embeds=torch.randn((1, 16), generator=inputs),
            negative_image_embeds=torch.randn((1, 16), generator=inputs),
        )
    return kwargs


def image_of(output: Any) -> torch.Tensor:
    """The pictures of a call's output, (B, H, W, C) in [0, 1]; a prior's embeddings squeezed there.

    Random weights leave embeddings at any scale; the map is monotonic, so that one bound serves.
    """
    images = getattr(output, "images", None)
    if images is not None:
        return torch.as_tensor(images)
    return torch.sigmoid(torch.as_tensor(output.image_embeddings) / 100)
