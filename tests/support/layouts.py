"""Pipeline folders in layouts that people have: optional components, old names, leftovers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support.archives import save_pipeline
from tests.support.pipelines import build
from tests.support.tiny_models import SIDE_PX, vision_encoder

UNET = "unet/diffusion_pytorch_model.safetensors"


def edit_index(folder: Path, **changes: object) -> Path:
    """Change entries of a folder's model_index.json; None removes one."""
    return edit_json(folder, "model_index.json", **changes)


def edit_json(folder: Path, name: str, **changes: object) -> Path:
    """Change entries of a JSON file of a folder; None removes one."""
    path = folder / name
    entries = {**json.loads(path.read_bytes()), **changes}
    path.write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))
    return folder


def edit_weights(folder: Path, name: str, **changes: torch.Tensor | None) -> Path:
    """Add or replace tensors of a safetensors file of a folder; None removes one."""
    weights = {**load_file(folder / name), **changes}
    kept = {key: tensor for key, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / name, metadata={"format": "pt"})
    return folder


def image_processor() -> transformers.CLIPImageProcessorPil:
    """The processor for `vision_encoder`."""
    return transformers.CLIPImageProcessorPil(crop_size=SIDE_PX, size=SIDE_PX)


def after_ip_adapter(folder: Path) -> Path:
    """Save Stable Diffusion after an IP-Adapter was loaded: its weights are in the UNet."""
    parts = {**build("stable_diffusion").components, "image_encoder": vision_encoder()}
    parts["feature_extractor"] = image_processor()
    pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.load_ip_adapter(_ip_adapter(pipeline.unet), subfolder="", weight_name="")
    pipeline.save_pretrained(folder)
    return folder


def _ip_adapter(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    width = unet.config.cross_attention_dim
    layers = {
        f"{number}.to_{kind}_ip.weight": torch.ones_like(
            unet.get_submodule(name.removesuffix(".processor")).to_k.weight
        )
        for number, name in enumerate(unet.attn_processors)
        if name.endswith("attn2.processor")
        for kind in "kv"
    }
    projection = {
        "proj.weight": torch.ones(4 * width, 16),
        "proj.bias": torch.ones(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.ones(width),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def without_third_encoder(folder: Path) -> Path:
    """Save Stable Diffusion 3 without T5, as those do who lack the memory."""
    pipeline = build("stable_diffusion_3")
    pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
    parts = {**pipeline.components, "text_encoder_3": None, "tokenizer_3": None}
    diffusers.StableDiffusion3Pipeline(**parts).save_pretrained(folder)
    return folder


def with_old_feature_extractor(folder: Path) -> Path:
    """Save Stable Diffusion with a CLIPFeatureExtractor, as it was called in transformers 4."""
    save_pipeline(folder)
    image_processor().save_pretrained(folder / "feature_extractor")
    edit_json(
        folder,
        "feature_extractor/preprocessor_config.json",
        image_processor_type=None,
        feature_extractor_type="CLIPFeatureExtractor",
    )
    return edit_index(folder, feature_extractor=["transformers", "CLIPFeatureExtractor"])


def lora_of_unet(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """A LoRA of one layer of the tiny Stable Diffusion's UNet; `changes` by the keys' ends."""
    ends = {"lora_A.weight": torch.ones(2, 4, 3, 3), "lora_B.weight": torch.ones(8, 2, 1, 1)}
    return {f"unet.conv_in.{end}": tensor for end, tensor in {**ends, **changes}.items()}


def scaled_fp8(folder: Path) -> Path:
    """Save Stable Diffusion with its UNet in scaled fp8, as some front ends share checkpoints."""
    save_pipeline(folder)
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / UNET).items():
        if not name.endswith(".weight") or tensor.ndim < 2:
            weights[name] = tensor
            continue
        scale = tensor.abs().max() / 448
        weights[name] = (tensor / scale).to(torch.float8_e4m3fn)
        weights[name.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
    weights["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(weights, folder / UNET, metadata={"format": "pt"})
    return folder


def plain_fp8(folder: Path) -> Path:
    """Save Stable Diffusion with its UNet in fp8 without scales: the same weights, rounded."""
    save_pipeline(folder)
    weights = {name: t.to(torch.float8_e4m3fn) for name, t in load_file(folder / UNET).items()}
    save_file(weights, folder / UNET, metadata={"format": "pt"})
    return folder


def quantized_by(folder: Path, method: str) -> Path:
    """Save Stable Diffusion with a UNet that says it is quantized by `method`."""
    save_pipeline(folder)
    return edit_json(folder, "unet/config.json", quantization_config={"quant_method": method})


def pixart_of_a_known_size() -> diffusers.DiffusionPipeline:
    """A tiny PixArt-Sigma of a sample size that its call has a table of sizes for."""
    pipeline = build("pixart_sigma")
    config = {**pipeline.transformer.config, "sample_size": 32}
    pipeline.transformer = diffusers.PixArtTransformer2DModel.from_config(config).eval()
    return pipeline
