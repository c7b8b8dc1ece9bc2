"""Single-file checkpoints in the original layout of Stable Diffusion, of tiny pipelines.

The names are the inverse of those that diffusers' conversion makes of the original ones.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import save_file

from tests.support.pipelines import build
from tests.support.tiny_models import make_every_parameter_count, unet

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj"}


def checkpoint_of(pipeline: Any) -> dict[str, torch.Tensor]:
    """The weights of a Stable Diffusion, or of an XL one, as one file of the original layout."""
    weights = ldm_unet(pipeline.unet) | ldm_vae(pipeline.vae)
    if hasattr(pipeline, "text_encoder_2"):
        weights |= _clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        return weights | _open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    return weights | _clip(pipeline.text_encoder, "cond_stage_model.transformer.")


def save_checkpoint(path: Path, pipeline: Any) -> Path:
    """Save `checkpoint_of` a pipeline as the file `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: each.contiguous() for name, each in checkpoint_of(pipeline).items()}, path)
    return path


def ldm_unet(model: diffusers.UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The weights of a UNet under their original names."""
    layers = model.config.layers_per_block
    has_attention = ["CrossAttn" in kind for kind in model.config.up_block_types]
    return {
        f"model.diffusion_model.{_unet_name(name, layers, has_attention)}": tensor
        for name, tensor in model.state_dict().items()
    }


def _unet_name(name: str, layers: int, has_attention: list[bool]) -> str:
    for before, after in _TOP.items():
        if name.startswith(f"{before}."):
            return after + name.removeprefix(before)
    place, rest = "", ""
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
        side, block, kind, layer, rest = match.groups()
        number = int(block) * (layers + 1) + int(layer)
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (int(block) + 1)}.0.op{rest.removeprefix('conv')}"
        if kind == "upsamplers":
            number = (layers + 1) * int(block) + layers
            return f"output_blocks.{number}.{2 if has_attention[int(block)] else 1}.{rest}"
        blocks = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
        place = f"{blocks}.{0 if kind == 'resnets' else 1}"
    elif match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, layer, rest = match.groups()
        place = f"middle_block.{2 * int(layer) if kind == 'resnets' else 1}"
    for before, after in _RESNET.items():
        if rest.startswith(f"{before}."):
            rest = after + rest.removeprefix(before)
    return f"{place}.{rest}"


def ldm_vae(model: diffusers.AutoencoderKL, prefix: str = "first_stage_model.") -> dict[str, Any]:
    """The weights of a VAE under their original names, `prefix` before them."""
    levels = len(model.config.block_out_channels)
    weights = {}
    for name, tensor in model.state_dict().items():
        renamed = _vae_name(name, levels)
        is_linear = "mid.attn_1" in renamed and tensor.ndim == 2
        weights[prefix + renamed] = tensor[:, :, None, None] if is_linear else tensor
    return weights


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(
        r"up_blocks\.(\d+)\.resnets\.(\d+)",
        lambda match: f"up.{levels - 1 - int(match[1])}.block.{match[2]}",
        name,
    )
    name = re.sub(
        r"up_blocks\.(\d+)\.upsamplers\.0",
        lambda match: f"up.{levels - 1 - int(match[1])}.upsample",
        name,
    )
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for before, after in _VAE_ATTENTION.items():
            name = name.replace(f".{before}.", f".{after}.")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def _clip(model: Any, prefix: str) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in model.state_dict().items()
    }


def _open_clip(model: Any, prefix: str) -> dict[str, torch.Tensor]:
    state = {name.removeprefix("text_model."): each for name, each in model.state_dict().items()}
    weights = {
        f"{prefix}positional_embedding": state["embeddings.position_embedding.weight"],
        f"{prefix}token_embedding.weight": state["embeddings.token_embedding.weight"],
        f"{prefix}ln_final.weight": state["final_layer_norm.weight"],
        f"{prefix}ln_final.bias": state["final_layer_norm.bias"],
        f"{prefix}text_projection": state["text_projection.weight"].T,
    }
    for name, tensor in state.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
        if match is None:
            continue
        block = f"{prefix}transformer.resblocks.{match[1]}"
        rest = match[2].replace("self_attn", "attn")
        if fused := re.fullmatch(r"attn\.q_proj\.(weight|bias)", rest):
            parts = [state[name.replace("q_proj", each)] for each in ("q_proj", "k_proj", "v_proj")]
            weights[f"{block}.attn.in_proj_{fused[1]}"] = torch.cat(parts)
        elif not re.match(r"attn\.[kv]_proj", rest):
            for before, after in _OPEN_CLIP.items():
                rest = rest.replace(before, after)
            weights[f"{block}.{rest}"] = tensor
    return weights


def build_xl() -> Any:
    """A tiny Stable Diffusion XL whose encoders differ in width, as diffusers tells them apart."""
    pipeline = build("stable_diffusion_xl")
    config = pipeline.text_encoder_2.config.to_dict() | {"hidden_size": 32, "projection_dim": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
        denoiser = unet(
            **{
                key: value
                for key, value in pipeline.unet.config.items()
                if not key.startswith("_")
                and key not in ("cross_attention_dim", "projection_class_embeddings_input_dim")
            },
            cross_attention_dim=16 + 32,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        )
        for module in (encoder, denoiser):
            make_every_parameter_count(module)
            module.eval()
    pipeline.register_modules(text_encoder_2=encoder, unet=denoiser)
    return pipeline


def without_weights(folder: Path) -> Path:
    """Remove the weights of the pipeline in `folder`: what a hub gives of it as configuration."""
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    return folder
