"""The ControlNets that are packed with a pipeline, each in a folder of its own within it."""

from __future__ import annotations

from typing import Any

import torch

from handler.errors import ArchiveError
from handler.loading.components import load_model
from handler.loading.contents import CONTROLNET_FOLDER, controlnet_names
from handler.loading.documents import parse_json
from handler.loading.model_dir import OpenedPipeline
from handler.messages import show

__all__ = ["controlnet_class", "load_controlnets"]

_CONFIG = "config.json"


def controlnet_class(config: bytes, label: str) -> Any:
    """Return the class that the configuration of a ControlNet names. Raises: ArchiveError."""
    import diffusers

    entries = parse_json(config, f"{label}: {_CONFIG}")
    name = entries.get("_class_name") if isinstance(entries, dict) else None
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if (
        not isinstance(found, type)
        or not issubclass(found, diffusers.ModelMixin)
        or "ControlNet" not in found.__name__
    ):
        raise ArchiveError(f"{label}: it is a {show(name)}, not a ControlNet of diffusers")
    return found


def load_controlnets(opened: OpenedPipeline, dtype: torch.dtype) -> dict[str, Any]:
    """Return the ControlNets of an opened pipeline by their names, mapped. Raises: ArchiveError."""
    found = {}
    for name in controlnet_names(opened.weights):
        folder = f"{CONTROLNET_FOLDER}/{name}"
        config = opened.folder / folder / _CONFIG
        if not config.is_file():
            raise ArchiveError(f"{folder}: has no {_CONFIG}")
        cls = controlnet_class(config.read_bytes(), folder)
        found[name] = load_model(opened, folder, cls, dtype)
    return found
