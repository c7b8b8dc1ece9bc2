"""The steps that `benchmarks.archive` times, each in a process of its own that prints JSON."""

from __future__ import annotations

import json
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

# Stable Diffusion 2.1's shapes.
UNET_21: dict[str, Any] = {
    "sample_size": 96,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
VAE_21: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}
TEXT_21: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
    "vocab_size": 49408,
    "hidden_act": "gelu",
}


def make(folder: Path, is_small: bool) -> dict[str, float]:
    """Save a Stable Diffusion pipeline of float16 noise, which nothing compresses."""
    import diffusers
    import transformers

    from demo.build import build_pipeline

    small = build_pipeline()
    if is_small:
        parts = {name: getattr(small, name).half() for name in ("unet", "vae", "text_encoder")}
    else:
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"):
            text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT_21))
            unet = diffusers.UNet2DConditionModel(**UNET_21)
            vae = diffusers.AutoencoderKL(**VAE_21)
        parts = {"unet": unet, "vae": vae, "text_encoder": text}
        generator = torch.Generator().manual_seed(0)
        for model in parts.values():
            model.to_empty(device="cpu")
            for parameter in model.parameters():
                parameter.data.normal_(0, 0.02, generator=generator)
    for name, model in parts.items():
        setattr(small, name, model)
    small.save_pretrained(folder)
    return {"bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())}


def import_libraries() -> None:
    """Import what both ways import when they first need it, before a clock starts."""
    import accelerate
    import diffusers
    import transformers

    used = (
        *(accelerate.init_empty_weights, diffusers.StableDiffusionPipeline),
        *(diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, diffusers.DDIMScheduler),
        *(transformers.CLIPTextModel, transformers.CLIPTokenizer, transformers.ProcessorMixin),
        *(transformers.ImageProcessingMixin, transformers.FeatureExtractionMixin),
    )
    assert all(used)


def open_ours(model_dir: Path) -> dict[str, float]:
    """From TorchServe's unpacked folder to weights on the CPU, in the archive's precision."""
    from handler.config import HandlerConfig
    from handler.loading.pipeline import load_pipeline

    import_libraries()
    begun_s = time.perf_counter()
    load_pipeline(model_dir, HandlerConfig(dtype="float16"), None)
    return {"seconds": time.perf_counter() - begun_s}


def open_upstream(model_dir: Path) -> dict[str, float]:
    """The same, by the upstream example's way: unzip model.zip, then from_pretrained."""
    from diffusers import DiffusionPipeline

    import_libraries()
    begun_s = time.perf_counter()
    with zipfile.ZipFile(model_dir / "model.zip") as archive:
        archive.extractall(model_dir / "model")
    unpacked_s = time.perf_counter()
    DiffusionPipeline.from_pretrained(model_dir / "model", dtype=torch.float16)
    done_s = time.perf_counter()
    return {
        "seconds": done_s - begun_s,
        "unpack_s": unpacked_s - begun_s,
        "load_s": done_s - unpacked_s,
    }


def hold(model_dir: Path) -> dict[str, float]:
    """Load, read every weight once, say so, and stay until told to go."""
    from handler.config import HandlerConfig
    from handler.loading.pipeline import load_pipeline

    pipeline = load_pipeline(model_dir, HandlerConfig(dtype="float16"), None).pipeline
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            for parameter in module.parameters():
                # A byte of every page; a sum over all would leave memory of its own behind.
                parameter.data.flatten().view(torch.uint8)[::4096].amax()
    print(json.dumps({"ready": 1}), flush=True)
    sys.stdin.readline()
    return {}


def main(arguments: list[str]) -> None:
    """Run one step: its name, its folder, and whether the pipeline is a small one."""
    step, folder = arguments[0], Path(arguments[1])
    if step == "make":
        result = make(folder, is_small=arguments[2:] == ["small"])
    else:
        result = {"open": open_ours, "open-upstream": open_upstream, "hold": hold}[step](folder)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
