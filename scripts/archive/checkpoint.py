"""Tells what a lone file of weights holds, by the names and shapes in its header."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from handler.loading.safetensors_map import Header, TensorInfo, read_header
from scripts.archive.pipeline_source import PipelineFile, file_at

__all__ = ["Kind", "header_of", "kind_of", "kind_of_file", "read_checkpoint", "usual_pipeline"]


class Kind(Enum):
    """What a file of weights is; the value is what messages call it."""

    CHECKPOINT = "a whole checkpoint"
    CONTROLNET = "a ControlNet"
    DENOISER = "a denoiser (UNet or transformer) alone"
    EMBEDDING = "an embedding (a textual inversion)"
    LORA = "a LoRA"
    TEXT_ENCODER = "a text encoder alone"
    VAE = "a VAE alone"
    OTHER = "a file of weights of no known kind"


_LORA = re.compile(r"\.lora_(A|B|up|down)\b|_lora\.(up|down)\b|\.(hada|lokr)_w1(_a)?\b")
_CONTROLNET = re.compile(r"(control_model|controlnet_cond_embedding|input_hint_block)\.")
_DENOISER = re.compile(
    r"(model\.diffusion_model|double_blocks|joint_blocks|time_embedding|transformer_blocks"
    r"|time_text_embed|down_blocks\.\d+\.attentions)\."
)
_VAE = re.compile(r"(first_stage_model\.|vae\.)?decoder\.(conv_in|mid|mid_block|up|up_blocks)\.")
_TEXT_ENCODER = re.compile(
    r"(cond_stage_model\.|conditioner\.|text_encoders\.|text_model\.|transformer\.resblocks\."
    r"|encoder\.block\.\d+\.layer\.|encoder\.layers\.)"
)
_EMBEDDING_NAMES = {"emb_params", "clip_l", "clip_g"}


def read_checkpoint(path: Path) -> Header:
    """Return the checked header of the safetensors file `path`. Raises: ArchiveError."""
    return header_of(file_at(path.name, path))


def header_of(file: PipelineFile) -> Header:
    """Return the checked header of a safetensors file. Raises: ArchiveError."""
    with file.path.open("rb") as source:
        return read_header(source, file.size_bytes, str(file.path), file.offset)


def kind_of_file(file: PipelineFile) -> Kind:
    """Say what a safetensors file holds. Raises: ArchiveError, where it is damaged."""
    return kind_of(header_of(file).tensors)


def kind_of(tensors: Mapping[str, TensorInfo]) -> Kind:
    """Say what a file of `tensors` holds."""
    if _any(_LORA.search, tensors):
        return Kind.LORA
    if tensors and all(_is_embedding(name, info) for name, info in tensors.items()):
        return Kind.EMBEDDING
    if _any(_CONTROLNET.match, tensors):
        return Kind.CONTROLNET
    has_denoiser = _any(_DENOISER.match, tensors)
    has_vae, has_text_encoder = _any(_VAE.match, tensors), _any(_TEXT_ENCODER.match, tensors)
    if has_denoiser:
        return Kind.CHECKPOINT if has_vae or has_text_encoder else Kind.DENOISER
    if has_vae:
        return Kind.VAE
    return Kind.TEXT_ENCODER if has_text_encoder else Kind.OTHER


def usual_pipeline(header: Header) -> tuple[str, str]:
    """Return diffusers' name for a whole checkpoint's kind, and the model with its configuration.

    Imports diffusers, whose table it is.
    """
    from diffusers.loaders import single_file_utils

    kind = single_file_utils.infer_diffusers_model_type(header.tensors)
    found = single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]
    return kind, str(found["pretrained_model_name_or_path"])


def _any(matches: Any, names: Iterable[str]) -> bool:
    return any(matches(name) for name in names)


def _is_embedding(name: str, info: TensorInfo) -> bool:
    is_named = name in _EMBEDDING_NAMES or re.fullmatch(r"<.+>", name) is not None
    return is_named and len(info.shape) in (1, 2)
