"""Says what was given as a pipeline's folder and is not one, and which command packs it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from shlex import quote

from handler.errors import ArchiveError, ServingError
from handler.loading.contents import MODEL_INDEX, PICKLE_SUFFIXES, WEIGHTS_SUFFIX
from scripts.archive.checkpoint import Kind, kind_of, read_checkpoint
from scripts.archive.manifest import TORCHSERVE_MANIFEST_NAME
from scripts.errors import UsageError
from scripts.hints import to_run

__all__ = ["has_lora_names", "mistaken_pipeline"]

_LORA_FILES = {"pytorch_lora_weights.safetensors", "adapter_config.json"}
_MODEL_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_WANTED = "give a folder that save_pretrained or the command download wrote"
_UNPICKLE = (
    """python -c 'import sys, torch, safetensors.torch as s; """
    """d = torch.load(sys.argv[1], weights_only=True); d = d.get("state_dict", d); """
    """s.save_file({k: v.clone() for k, v in d.items() if torch.is_tensor(v)}, sys.argv[2])'"""
)
_PACK_THE_PIPELINE = "pack the pipeline that it belongs to"


def mistaken_pipeline(path: Path) -> ServingError:
    """Return the error that says what `path` is, which holds no model_index.json, and the remedy.

    A UsageError where there is no `path` at all, else an ArchiveError.
    """
    if not path.exists():
        return UsageError(f"{path} does not exist: {_model_id_hint(path) or _WANTED}")
    what = _file(path) if path.is_file() else _folder(path)
    return ArchiveError(f"{path} is not a diffusers pipeline: {what}")


def has_lora_names(names: Iterable[str]) -> bool:
    """Say whether files of these names, in the folder of a model, are those of a LoRA."""
    return not _LORA_FILES.isdisjoint(names)


def _model_id_hint(path: Path) -> str:
    if not _MODEL_ID.fullmatch(str(path)):
        return ""
    return f"a model of that name on the hub is packed by {to_run('pack', model_id=str(path))}"


def _file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".mar":
        return _archive(path, path.stem)
    if suffix == ".zip":
        return f"it is a zip; {to_run('pack', pipeline=str(path))} packs the pipeline in it"
    if suffix == WEIGHTS_SUFFIX:
        return _weights_file(path)
    if suffix in PICKLE_SUFFIXES:
        target = quote(f"{path.stem}{WEIGHTS_SUFFIX}")
        return (
            "it is a file of pickled weights, which can run code when loaded; look for the same "
            f"model as safetensors, or convert it, as far as no code is in it: {_UNPICKLE} "
            f"{quote(str(path))} {target}"
        )
    return f"it is a file; {_WANTED}"


def _weights_file(path: Path) -> str:
    try:
        kind = kind_of(read_checkpoint(path).tensors)
    except ArchiveError:
        return f"it is a damaged file of weights; {_WANTED}"
    file = quote(str(path))
    if kind is Kind.CHECKPOINT:
        return (
            "it is a whole checkpoint in one file; a pipeline of its kind gives the configuration: "
            + to_run("pack", "--config-from FOLDER", pipeline=str(path))
        )
    remedy = {
        Kind.LORA: f"{_PACK_THE_PIPELINE}, with --lora {file}",
        Kind.EMBEDDING: (
            "embeddings are not served yet; pack the pipeline that it belongs to without it"
        ),
        Kind.VAE: f"{_PACK_THE_PIPELINE}, with --component vae={file}",
        Kind.TEXT_ENCODER: f"{_PACK_THE_PIPELINE}, with --component text_encoder={file}",
        Kind.DENOISER: (
            f"{_PACK_THE_PIPELINE}, with --component unet={file}, or transformer= where that is "
            "the component's name"
        ),
        Kind.CONTROLNET: (
            "ControlNets are not served yet; pack the pipeline that it belongs to without it"
        ),
        Kind.OTHER: _WANTED,
    }
    return f"it is {kind.value}; {remedy[kind]}"


def _archive(path: Path, name: str) -> str:
    serve = to_run("serve", store=str(path.parent), name=name)
    return (
        f"it is a finished archive; {serve} serves it, "
        f"{to_run('pack', **{'from': str(path)})} packs it again with other options"
    )


def _folder(path: Path) -> str:
    if (path / TORCHSERVE_MANIFEST_NAME).exists():
        return _archive(path, path.name)
    names = sorted(each.name for each in path.iterdir())
    if has_lora_names(names):
        weights = [name for name in names if name.endswith(WEIGHTS_SUFFIX)]
        file = quote(str(path / weights[0])) if len(weights) == 1 else "its .safetensors file"
        return f"it is a LoRA; {_PACK_THE_PIPELINE}, with --lora {file}"
    if "config.json" in names:
        return (
            "it is one component (it has a config.json); pack the pipeline that it belongs to, "
            f"with --component NAME={quote(str(path))}"
        )
    inner = sorted(found.parent for found in path.glob(f"*/{MODEL_INDEX}"))
    if len(inner) == 1:
        return f"one is in it: {to_run('pack', pipeline=str(inner[0]))}"
    return f"it has no {MODEL_INDEX}; {_WANTED}"
